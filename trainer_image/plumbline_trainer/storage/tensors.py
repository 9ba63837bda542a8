"""Tensors that a stage computes once and finds again after a restart."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from plumbline_trainer.storage.kept import keep_bytes, kept_bytes
from plumbline_trainer.storage.objects import ObjectStore

SUFFIX = ".safetensors"


def keep_tensors(store: ObjectStore, place: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors."""
    keep_bytes(
        store, place, SUFFIX, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    )


def kept_tensors(store: ObjectStore, place: str) -> dict[str, Tensor] | None:
    """The tensors kept at a place; None if there are none or they are damaged."""
    data = kept_bytes(store, place, SUFFIX)
    try:
        return None if data is None else load(data)
    except SafetensorError:
        return None
