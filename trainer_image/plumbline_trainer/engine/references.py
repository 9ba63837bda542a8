"""What the reference policy says of every response: one number each, found by content."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from plumbline_trainer.data.encode import Encoded, EncodedResponse
from plumbline_trainer.engine.packing import PackedBatch, inputs_needed
from plumbline_trainer.engine.scoring import Scores


def response_key(prompt: Sequence[int], response: EncodedResponse) -> bytes:
    """Identity of a response for its score: the ids of prompt and response, and which of them are scored."""
    state = hashlib.sha256(f"{len(prompt)}/{len(response.ids)}/".encode())
    state.update(array("q", prompt).tobytes())
    state.update(array("q", response.ids).tobytes())
    state.update(bytes(response.mask))
    return state.digest()


def row_keys(row: Encoded) -> list[bytes]:
    """Keys of a row's responses, in order."""
    return [response_key(row.prompt, response) for response in row.responses]


class References:
    """Log-probabilities of responses under the reference policy, summed over their tokens."""

    def __init__(self, rows: Sequence[Encoded], scores: Scores) -> None:
        """Of scored rows."""
        self._totals = totals_by_key(rows, scores)

    @classmethod
    def known(cls, totals: Mapping[bytes, Tensor]) -> References:
        """Of totals that are there already, by `response_key`."""
        found = cls([], [])
        found._totals = dict(totals)
        return found

    def of(self, rows: Iterable[Encoded]) -> Tensor:
        """Sum over each response of rows, [responses]; 0 for rows of weight 0, which may be dummies.

        Raises:
            KeyError: if a row was not scored.
        """
        parts = [
            torch.zeros(()) if row.weight == 0 else self._totals[key]
            for row in rows
            for key in (row_keys(row) if row.weight else [b""] * len(row.responses))
        ]
        return torch.stack(parts) if parts else torch.zeros(0)

    def totals(self, batch: PackedBatch) -> Tensor:
        """Sum over each answer of a batch, [answers], as `of` its rows."""
        return self.of(batch.rows)


def totals_by_key(rows: Sequence[Encoded], scores: Scores) -> dict[bytes, Tensor]:
    """Totals of scored rows. Sums run over the scored tokens alone, in the order in which the policy's do."""
    found: dict[bytes, Tensor] = {}
    for row, of_row in zip(rows, scores, strict=True):
        for key, response, tokens in zip(row_keys(row), row.responses, of_row, strict=True):
            places = [index for index, scored in enumerate(response.mask) if scored and (index > 0 or row.prompt)]
            found[key] = tokens[places].sum()
    return found


def by_prompt(rows: Iterable[Encoded], known: Iterable[bytes], budget: int) -> list[Encoded]:
    """The responses of rows that are not known yet, each once, laid out so that one prompt serves many of them.

    Args:
        rows: In the order in which prompts come first.
        known: Keys that need no score.
        budget: A prompt with more answers than fit into so many tokens stands several times.
    """
    seen = set(known)
    groups: dict[tuple[int, ...], list[Encoded]] = {}
    for row in rows:
        for key, response in zip(row_keys(row), row.responses, strict=True):
            if key in seen:
                continue
            seen.add(key)
            alone = Encoded(row.row_id, row.group, row.prompt, [response])
            groups.setdefault(tuple(row.prompt), []).append(alone)
    found: list[Encoded] = []
    for prompt, items in groups.items():
        length = budget + 1
        for item in items:
            needed = inputs_needed(item.responses[0])
            # Without a prompt there is nothing to share.
            if not prompt or length + needed > budget:
                found.append(item)
                length = len(prompt) + needed
            else:
                found[-1].responses.append(item.responses[0])
                length += needed
    return found
