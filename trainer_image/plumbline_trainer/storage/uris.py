"""Locations: taken apart, joined, and confined to their prefix."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from plumbline_trainer.errors import InputError

CLAIMS_ROOT = Path("/mnt/claims")
"""Where the operator mounts PersistentVolumeClaims, one folder per claim."""


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a bucket (`scheme` s3) or on a file system (`scheme` file, `bucket` empty, `key` an absolute path)."""

    scheme: str
    bucket: str
    key: str


def check_relative(path: str) -> str:
    """A path below some root, as manifests name files.

    Raises:
        InputError: for absolute paths, `..`, empty parts, backslashes, control characters and percent-encoded tricks.
    """
    parts = path.split("/")
    decoded = unquote(path)
    bad = (
        not path
        or any(part in ("", ".", "..") for part in parts)
        or any(part in ("", ".", "..") for part in decoded.split("/"))
        or "\\" in path
        or any(ord(char) < 32 or ord(char) == 127 for char in decoded)
    )
    if bad:
        raise InputError(
            f"{path!r} is not a path below its root: absolute paths, `..` and control characters are refused"
        )
    return path


def join(root: str, relative: str) -> str:
    """URI of a path below a root URI; never outside it."""
    return f"{root.rstrip('/')}/{check_relative(relative)}"


def parse(uri: str) -> Location:
    """Take a URI apart. Paths without a scheme are files; `pvc://claim/path` is the mounted claim.

    Raises:
        InputError: for schemes without objects, for `..` and for control characters.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        scheme, rest = "file", uri
    if any(ord(char) < 32 or ord(char) == 127 for char in rest) or ".." in rest.split("/"):
        raise InputError(f"{uri!r}: `..` and control characters are refused in locations")
    if scheme == "file":
        return Location("file", "", posixpath.normpath(str(Path(rest).absolute())))
    if scheme == "pvc":
        claim, _, path = rest.partition("/")
        if not claim:
            raise InputError(f'"{uri}": write pvc://claim/path')
        return Location("file", "", posixpath.normpath(str(CLAIMS_ROOT / claim / path)))
    if scheme == "s3":
        bucket, _, key = rest.partition("/")
        if not bucket:
            raise InputError(f'"{uri}": write s3://bucket/path')
        return Location("s3", bucket, key)
    raise InputError(f'"{uri}": objects are read from s3://, pvc:// or file://, not from {scheme}://')


def basename(uri: str) -> str:
    """Last part of a URI."""
    return uri.rstrip("/").rpartition("/")[2]


def is_pattern(uri: str) -> bool:
    """Whether a URI holds a glob."""
    return any(char in uri for char in "*?[")
