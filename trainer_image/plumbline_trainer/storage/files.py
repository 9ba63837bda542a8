"""Objects as files of a mounted file system.

They are written beside their place and renamed, so that readers never see half of one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.storage.uris import Location

CHUNK = 4 * 1024 * 1024
PARTIAL_SUFFIX = ".part"
"""Ends the name of a file that is still being written; such files are no objects."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def copy_hashed(source: BinaryIO, target: BinaryIO) -> str:
    """Copy to the end of a stream; the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    while count := source.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
        target.write(buffer[:count])
    return digest.hexdigest()


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to it on success, removed on failure."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}{PARTIAL_SUFFIX}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class FileBackend:
    """Objects of the schemes file:// and pvc://."""

    def put_file(self, place: Location, path: Path) -> str:
        """Copy a file in."""
        target = Path(place.key)
        with _explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with replaced(target) as partial, path.open("rb") as source, partial.open("xb") as sink:
                digest = copy_hashed(source, sink)
                sink.flush()
                os.fsync(sink.fileno())
        return digest

    def put_bytes(self, place: Location, data: bytes, *, if_absent: bool) -> bool:
        """Write a file; with `if_absent` by a hard link, which fails where the name is taken."""
        target = Path(place.key)
        with _explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}{PARTIAL_SUFFIX}")
            try:
                with partial.open("xb") as sink:
                    sink.write(data)
                    sink.flush()
                    os.fsync(sink.fileno())
                if not if_absent:
                    partial.replace(target)
                    return True
                try:
                    os.link(partial, target)
                except FileExistsError:
                    return False
                return True
            finally:
                partial.unlink(missing_ok=True)

    def get_file(self, place: Location, path: Path) -> str:
        """Copy a file out."""
        source_path = Path(place.key)
        with (
            _explained(source_path),
            replaced(path) as partial,
            source_path.open("rb") as source,
            partial.open("xb") as sink,
        ):
            return copy_hashed(source, sink)

    def get_bytes(self, place: Location) -> bytes:
        """The bytes of a file."""
        with _explained(Path(place.key)):
            return Path(place.key).read_bytes()

    def get_range(self, place: Location, offset: int, length: int) -> bytes:
        """A part of a file."""
        path = Path(place.key)
        with _explained(path), path.open("rb") as source:
            source.seek(offset)
            return source.read(length)

    def hash(self, place: Location) -> tuple[str, int]:
        """SHA-256 and size of a file."""
        path = Path(place.key)
        with _explained(path):
            return file_digest(path), path.stat().st_size

    def head(self, place: Location) -> tuple[int, str, str] | None:
        """Size, identity and time of a file."""
        path = Path(place.key)
        try:
            return _described(path.stat()) if path.is_file() else None
        except (FileNotFoundError, NotADirectoryError):
            return None

    def entries(self, place: Location) -> Iterator[tuple[str, int, str, str]]:
        """Files below a folder, symbolic links to folders not followed."""
        root = Path(place.key)
        with _explained(root):
            for folder, _, names in os.walk(root):
                for name in names:
                    path = Path(folder) / name
                    if name.endswith(PARTIAL_SUFFIX) or not path.is_file():
                        continue
                    yield path.relative_to(root).as_posix(), *_described(path.stat())

    def abort_uploads(self, place: Location) -> None:
        """Drop what killed writers left beside the files."""
        root = Path(place.key)
        with _explained(root):
            for path in root.rglob(f".*{PARTIAL_SUFFIX}") if root.is_dir() else ():
                path.unlink(missing_ok=True)

    def delete(self, places: Sequence[Location]) -> None:
        """Delete files and the folders that become empty."""
        for place in places:
            path = Path(place.key)
            with _explained(path):
                path.unlink(missing_ok=True)
                for folder in path.parents:
                    try:
                        folder.rmdir()
                    except OSError:
                        break


def _described(stat: os.stat_result) -> tuple[int, str, str]:
    when = datetime.fromtimestamp(stat.st_mtime, UTC).isoformat(timespec="seconds")
    return stat.st_size, f"{stat.st_mtime_ns}-{stat.st_ino}", when


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the operating system says into what a person should do."""
    try:
        yield
    except (PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise InputError(
            f"{error.filename or path}: {(error.strerror or str(error)).lower()}. "
            "Check the path and that this user may read and write there",
            reason="StorageDenied",
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{path}: no space is left on the device. Free some, then retry", reason="DiskFull"
            ) from error
        if error.errno == errno.EROFS:
            raise InputError(
                f"{path}: the file system is read-only; choose another place", reason="StorageDenied"
            ) from error
        if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
            raise TransientError(f"{path}: {error.strerror}", reason="StorageUnavailable") from error
        raise
