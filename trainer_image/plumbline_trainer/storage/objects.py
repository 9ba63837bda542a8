"""One object store for file:// and s3://: the only way the trainer reads and writes anything that outlives its pod."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from plumbline_trainer.errors import InputError
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.files import FileBackend
from plumbline_trainer.storage.uris import Location

if TYPE_CHECKING:
    from plumbline_api.pipeline import Storage

PARALLEL_OBJECTS = 4
"""Objects moved at once; each large one is itself moved in parallel parts."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing says about an object."""

    uri: str
    size: int
    etag: str
    """Changes when the object does: the ETag, or modification time and inode of a file."""
    modified: str = ""
    """When it was last written."""


Objects = list[ObjectInfo]
StoredFiles = list[tuple[str, int, str]]
"""Relative path, size and SHA-256 of uploaded files."""
Entry = tuple[str, int, str, str]
"""Key below the listed folder, size, ETag, time."""


class Backend(Protocol):
    """What a scheme must be able to do.

    Missing objects raise FileNotFoundError, everything else becomes one of the trainer's errors.
    """

    def put_file(self, place: Location, path: Path) -> str:
        """Upload a file; its SHA-256."""

    def put_bytes(self, place: Location, data: bytes, *, if_absent: bool) -> bool:
        """Write an object; False if it must be absent and is not."""

    def get_file(self, place: Location, path: Path) -> str:
        """Download an object; the SHA-256 of what was received."""

    def get_bytes(self, place: Location) -> bytes:
        """Read an object."""

    def get_range(self, place: Location, offset: int, length: int) -> bytes:
        """Read so many bytes of an object that has them."""

    def head(self, place: Location) -> tuple[int, str, str] | None:
        """Size, ETag and time; None if it is not there."""

    def hash(self, place: Location) -> tuple[str, int]:
        """SHA-256 and size of the bytes as they are now."""

    def entries(self, place: Location) -> Iterator[Entry]:
        """Objects below a folder."""

    def delete(self, places: Sequence[Location]) -> None:
        """Delete objects; those that are not there are no error."""

    def abort_uploads(self, place: Location) -> None:
        """Drop what was uploaded in part below a folder."""


class ObjectStore:
    """Objects by full URI. Thread-safe.

    Errors: `InputError` (reason StorageDenied, StorageMissing, …) where a person must act, `TransientError` where
    trying again may help, `FileNotFoundError` for an object that is not there.
    """

    def __init__(self, *, endpoint: str | None = None, region: str | None = None) -> None:
        self._endpoint, self._region = endpoint, region
        self._backends: dict[str, Backend] = {}

    def put_file(self, uri: str, path: Path) -> str:
        """Upload a file; its SHA-256. Readers see the whole object or none."""
        backend, place = self._at(uri)
        return backend.put_file(place, path)

    def put_bytes(self, uri: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write a small object. With `if_absent`: False if somebody else's object was there first."""
        backend, place = self._at(uri)
        return backend.put_bytes(place, data, if_absent=if_absent)

    def get_file(self, uri: str, path: Path) -> str:
        """Download to a file (written beside it and renamed); the SHA-256 of what was received."""
        backend, place = self._at(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        return backend.get_file(place, path)

    def get_bytes(self, uri: str) -> bytes:
        """A small object."""
        backend, place = self._at(uri)
        return backend.get_bytes(place)

    def get_range(self, uri: str, offset: int, length: int) -> bytes:
        """A part of an object, which must be within its size."""
        backend, place = self._at(uri)
        return backend.get_range(place, offset, length)

    def hash(self, uri: str) -> tuple[str, int]:
        """SHA-256 and size of an object's bytes as they are read now; nothing is kept."""
        backend, place = self._at(uri)
        return backend.hash(place)

    def stat(self, uri: str) -> ObjectInfo | None:
        """Size and ETag; None if there is no such object."""
        backend, place = self._at(uri)
        found = backend.head(place)
        return None if found is None else ObjectInfo(uri, *found)

    def exists(self, uri: str) -> bool:
        """Whether an object is there."""
        return self.stat(uri) is not None

    def list(self, prefix: str) -> Objects:
        """Objects below a folder, in order of their URI; empty when the folder is not there."""
        backend, place = self._at(prefix.rstrip("/"))
        root = prefix.rstrip("/")
        found = [ObjectInfo(f"{root}/{key}", size, etag, when) for key, size, etag, when in backend.entries(place)]
        return sorted(found, key=lambda info: info.uri)

    def glob(self, pattern: str) -> Objects:
        """Objects that match a URI with `*`, `?`, `[…]`; `*` does not cross `/`, `**` does."""
        fixed = pattern
        while uris.is_pattern(fixed):
            fixed = fixed.rpartition("/")[0]
        if "://" not in fixed and "://" in pattern:
            raise InputError(f'"{pattern}": the bucket itself cannot be a pattern')
        expression = re.compile(_glob_expression(pattern))
        return [info for info in self.list(fixed) if expression.fullmatch(info.uri)]

    def delete_prefix(self, prefix: str) -> None:
        """Delete everything below a folder."""
        backend, _ = self._at(prefix)
        backend.delete([uris.parse(info.uri) for info in self.list(prefix)])

    def abort_uploads(self, prefix: str) -> None:
        """Drop what killed writers left half uploaded below a folder. Nobody else may be writing there."""
        backend, place = self._at(prefix)
        backend.abort_uploads(place)

    def put_folder(self, root: str, folder: Path) -> StoredFiles:
        """Upload every file below a folder, several at once: (relative path, size, SHA-256) in order of path."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in paths]
        targets = [uris.join(root, name) for name in names]
        with ThreadPoolExecutor(PARALLEL_OBJECTS) as pool:
            digests = list(pool.map(self.put_file, targets, paths))
        return [(name, path.stat().st_size, digest) for name, path, digest in zip(names, paths, digests, strict=True)]

    def _at(self, uri: str) -> tuple[Backend, Location]:
        place = uris.parse(uri)
        backend = self._backends.get(place.scheme)
        if backend is None:
            backend = self._open(place.scheme)
            self._backends[place.scheme] = backend
        return backend, place

    def _open(self, scheme: str) -> Backend:
        if scheme == "file":
            return FileBackend()
        from plumbline_trainer.storage.s3 import S3Backend

        return S3Backend(endpoint=self._endpoint, region=self._region)


def open_store(storage: Storage) -> ObjectStore:
    """The store of a run; credentials come from the environment (AWS_*)."""
    return ObjectStore(endpoint=storage.endpoint, region=storage.region)


def _glob_expression(pattern: str) -> str:
    """A regular expression in which `*` and `?` stop at `/` and `**` does not."""
    pieces = []
    for part in re.split(r"(\*\*/?|\*|\?|\[[^]/]+\])", pattern):
        if part.startswith("**"):
            pieces.append("(?:.*/)?" if part.endswith("/") else ".*")
        elif part == "*":
            pieces.append("[^/]*")
        elif part == "?":
            pieces.append("[^/]")
        elif part.startswith("["):
            pieces.append(translate(part).removeprefix("(?s:").removesuffix(r")\Z"))
        else:
            pieces.append(re.escape(part))
    return "".join(pieces)
