"""Bytes that a stage computes once and finds again after a restart."""

from __future__ import annotations

import hashlib

from plumbline_trainer.storage.objects import ObjectStore


def keep_bytes(store: ObjectStore, place: str, suffix: str, data: bytes) -> None:
    """Write bytes; the checksum is written last and makes them valid."""
    store.put_bytes(f"{place}{suffix}", data)
    store.put_bytes(f"{place}.sha256", hashlib.sha256(data).hexdigest().encode())


def kept_bytes(store: ObjectStore, place: str, suffix: str) -> bytes | None:
    """The bytes kept at a place; None if there are none or they are damaged."""
    try:
        expected = store.get_bytes(f"{place}.sha256").decode().strip()
        data = store.get_bytes(f"{place}{suffix}")
        return data if hashlib.sha256(data).hexdigest() == expected else None
    except (FileNotFoundError, UnicodeDecodeError):
        return None
