"""A key-value cache whose rows come and go while it grows: nothing is copied but what moves.

Rows end at the same column, as left padding wants it, so that a row's distances between columns are its distances
between tokens and sliding windows hold. Columns before the longest row are left out of what the model sees. A row that
leaves gives its place to the last one; a row that joins is written into a free place.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from plumbline_trainer.engine.scorer import recurrent_layers

_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of one layer, [places, heads, columns, d], of which a window of rows and columns is in use."""

    def __init__(self, rows: RowCache) -> None:
        super().__init__()
        # A cycle would keep the memory of a rollout until the garbage collector comes by.
        self._rows = cast("RowCache", weakref.proxy(rows))
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one column and return all columns in use, the new one included; `RowCache.advance` counts it."""
        rows = self._rows
        assert self._keys is not None
        assert self._values is not None
        end = rows.end + key_states.shape[2]
        self._keys[: rows.count, :, rows.end : end] = key_states
        self._values[: rows.count, :, rows.end : end] = value_states
        return self._keys[: rows.count, :, rows.start : end], self._values[: rows.count, :, rows.start : end]

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self._rows.width

    def move(self, places: int, columns: int, end: int) -> None:
        """Allocate anew and put what is in use where it then ends at column `end`."""
        rows = self._rows
        assert self._keys is not None
        assert self._values is not None
        self._keys = _moved(self._keys, rows, places, columns, end)
        self._values = _moved(self._values, rows, places, columns, end)

    def write(self, keys: Tensor, values: Tensor, places: Sequence[tuple[int, int, int, int]]) -> None:
        """Copy rows of a cache that ends where this one ends: (source, first place, places, tokens) each."""
        if self._keys is None or self._values is None:
            shape = (self._rows.places, keys.shape[1], self._rows.columns)
            # Zeros, because what is masked is still multiplied, and memory may hold anything.
            self._keys = keys.new_zeros((*shape, keys.shape[3]))
            self._values = values.new_zeros((*shape, values.shape[3]))
        end = self._rows.end
        for source, first, count, tokens in places:
            self._keys[first : first + count, :, end - tokens : end] = keys[source, :, -tokens:]
            self._values[first : first + count, :, end - tokens : end] = values[source, :, -tokens:]

    def fill(self, places: Tensor, sources: Tensor) -> None:
        """Copy rows within."""
        rows = self._rows
        for tensor in (self._keys, self._values):
            assert tensor is not None
            used = tensor[:, :, rows.start : rows.end]
            used[places] = used[sources]


def _moved(tensor: Tensor, rows: RowCache, places: int, columns: int, end: int) -> Tensor:
    moved = tensor.new_zeros((places, tensor.shape[1], columns, tensor.shape[3]))
    moved[: rows.count, :, end - rows.width : end] = tensor[: rows.count, :, rows.start : rows.end]
    return moved


def unfit(model: Any) -> str | None:
    """Why rows of this model's cache cannot come and go; None where they can."""
    if (reason := recurrent_layers(model)) is not None:
        return reason
    name = type(model).__name__
    accepted = inspect.signature(model.forward).parameters
    for argument in ("attention_mask", "position_ids", "past_key_values"):
        if argument not in accepted:
            return f"{name} takes no {argument}"
    config = model.config.get_text_config()
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return f"{name} has layers of type chunked_attention"
    others = [type(x).__name__ for x in DynamicCache(config=config).layers if type(x) not in _PLAIN_LAYERS]
    return f"{name} caches its tokens in a {others[0]}" if others else None


class RowCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """The cache of a batch whose rows come and go."""

    def __init__(self, layers: int) -> None:
        self.places = 0
        """Rows that there is memory for."""
        self.columns = 0
        """Tokens of a row that there is memory for."""
        self.count = 0
        """Rows in use: the first ones."""
        self.start = 0
        self.end = 0
        super().__init__(layers=[_Layer(self) for _ in range(layers)])

    @property
    def width(self) -> int:
        """Columns in use."""
        return self.end - self.start

    def reserve(self, places: int, columns: int, width: int) -> None:
        """Have memory for so many rows and columns, with what is in use ending at or after column `width`."""
        end = max(self.width, width)
        if self.count:
            for layer in self.layers:
                layer.move(places, columns, end)
        else:
            for layer in self.layers:
                layer._keys = layer._values = None
        self.start, self.end = end - self.width if self.count else end, end
        self.places, self.columns = places, columns

    def join(self, cache: DynamicCache, rows: Sequence[tuple[int, int, int]]) -> None:
        """Take rows of a prefilled, left-padded cache: (row there, copies, tokens) each, in new places at the end."""
        places = []
        for source, copies, tokens in rows:
            places.append((source, self.count, copies, tokens))
            self.count += copies
            self.start = min(self.start, self.end - tokens)
        for layer, filled in zip(self.layers, cache.layers, strict=True):
            layer.write(filled.keys, filled.values, places)

    def keep(self, stay: Sequence[int], width: int) -> list[int]:
        """Let rows leave.

        Args:
            stay: rows that stay, in ascending order.
            width: of the longest of them.

        Returns:
            Which row is in each place now.
        """
        kept = set(stay)
        free = [place for place in range(len(stay)) if place not in kept]
        moved = list(stay[len(stay) - len(free) :])
        if free:
            device = self.layers[0]._keys.device
            places, sources = torch.tensor(free, device=device), torch.tensor(moved, device=device)
            for layer in self.layers:
                layer.fill(places, sources)
        self.count = len(stay)
        self.start = self.end - width
        came = dict(zip(free, moved, strict=True))
        return [came.get(place, place) for place in range(len(stay))]

    def advance(self) -> None:
        """Count the column that the last forward pass wrote."""
        self.end += 1
