"""What the reference policy says of the rows: computed once when a stage starts, kept in storage, found by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.packing import PackedBatch
from plumbline_trainer.engine.scoring import Scores
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.objects import ObjectStore

FOLDER = "references"


@dataclass(frozen=True)
class ReferenceKey:
    """What log-probabilities depend on besides the rows."""

    weights: str
    """Identity of the reference policy's weights."""
    path: str
    precision: str
    numerics_version: int
    split: str
    """How the work was cut: budget and ranks; another cut may round differently."""

    def digest(self, rows: Sequence[Encoded]) -> str:
        """Name of the cache entry for these rows."""
        state = hashlib.sha256(
            json.dumps([self.weights, self.path, self.precision, self.numerics_version, self.split]).encode()
        )
        for row in rows:
            state.update(row_key(row))
        return state.hexdigest()


def row_key(row: Encoded) -> bytes:
    """Identity of a row for its scores: token ids and response masks."""
    document = [row.prompt, [[response.ids, [int(bit) for bit in response.mask]] for response in row.responses]]
    return hashlib.sha256(json.dumps(document, separators=(",", ":")).encode()).digest()


class References:
    """Log-probabilities of responses under the reference policy."""

    def __init__(self, rows: Sequence[Encoded], scores: Scores) -> None:
        self._totals = {
            row_key(row): torch.stack([tokens.sum() for tokens in _scored_only(row, found)])
            for row, found in zip(rows, scores, strict=True)
        }

    def totals(self, batch: PackedBatch) -> Tensor:
        """Sum over each answer of a batch, [answers]; 0 for rows of weight 0, which may be dummies.

        Raises:
            KeyError: if a row was not scored.
        """
        return torch.cat(
            [torch.zeros(len(row.responses)) if row.weight == 0 else self._totals[row_key(row)] for row in batch.rows]
        )


def _scored_only(row: Encoded, scores: Sequence[Tensor]) -> list[Tensor]:
    """The scored tokens, so that sums run over the same values in the same order as the policy's."""
    return [
        tokens[[index for index, scored in enumerate(response.mask) if scored and (index > 0 or row.prompt)]]
        for response, tokens in zip(row.responses, scores, strict=True)
    ]


def load_scores(store: ObjectStore, run_root: str, key: str, rows: Sequence[Encoded]) -> Scores | None:
    """Scores kept under a key; None if there are none or they are damaged, and then they are computed again."""
    place = uris.join(run_root, f"{FOLDER}/{key}")
    try:
        expected = store.get_bytes(f"{place}.sha256").decode().strip()
        data = store.get_bytes(f"{place}.safetensors")
        if hashlib.sha256(data).hexdigest() != expected:
            return None
        flat = load(data)["scores"]
    except (FileNotFoundError, UnicodeDecodeError, SafetensorError, KeyError):
        return None
    sizes = [len(response.ids) for row in rows for response in row.responses]
    if flat.shape != (sum(sizes),) or flat.dtype != torch.float32:
        return None
    parts = iter(flat.split(sizes))
    return [[next(parts) for _ in row.responses] for row in rows]


def save_scores(store: ObjectStore, run_root: str, key: str, scores: Scores) -> None:
    """Keep scores; the checksum is written last and makes them valid."""
    place = uris.join(run_root, f"{FOLDER}/{key}")
    parts = [tokens for row in scores for tokens in row]
    data = save({"scores": torch.cat(parts) if parts else torch.zeros(0)})
    store.put_bytes(f"{place}.safetensors", data)
    store.put_bytes(f"{place}.sha256", hashlib.sha256(data).hexdigest().encode())
