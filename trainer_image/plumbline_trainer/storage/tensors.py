"""Tensors that a stage computes once and finds again after a restart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from plumbline_trainer.storage.objects import ObjectStore


def keep_tensors(store: ObjectStore, place: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors; the checksum is written last and makes them valid."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    store.put_bytes(f"{place}.safetensors", data)
    store.put_bytes(f"{place}.sha256", hashlib.sha256(data).hexdigest().encode())


def kept_tensors(store: ObjectStore, place: str) -> dict[str, Tensor] | None:
    """The tensors kept at a place; None if there are none or they are damaged."""
    try:
        expected = store.get_bytes(f"{place}.sha256").decode().strip()
        data = store.get_bytes(f"{place}.safetensors")
        return load(data) if hashlib.sha256(data).hexdigest() == expected else None
    except (FileNotFoundError, UnicodeDecodeError, SafetensorError):
        return None
