"""Rows of random token ids, for tests of the engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from plumbline_trainer.data.encode import Encoded, EncodedResponse, Role

VOCABULARY = 256
"""Ids below it exist in every tiny model."""


def make_response(
    rng: random.Random,
    length: int,
    role: Role,
    *,
    first_scored: int = 0,
    share: float = 1.0,
) -> EncodedResponse:
    """A response of random ids; each token from `first_scored` on carries loss with a probability."""
    mask = [index >= first_scored and rng.random() < share for index in range(length)]
    if not any(mask):
        mask[-1] = True
    return EncodedResponse([rng.randrange(VOCABULARY) for _ in range(length)], mask, role)


def make_pair(rng: random.Random, prompt: int, chosen: int, rejected: int, name: str = "") -> Encoded:
    """A preference row; without a prompt its first tokens are not scored."""
    first = 0 if prompt else 1
    return Encoded(
        row_id=name or f"pair-{rng.random()}",
        group="g",
        prompt=[rng.randrange(VOCABULARY) for _ in range(prompt)],
        responses=[
            make_response(rng, chosen, "chosen", first_scored=first),
            make_response(rng, rejected, "rejected", first_scored=first),
        ],
    )


def make_thumb(rng: random.Random, prompt: int, length: int, name: str, *, desirable: bool) -> Encoded:
    """An unpaired row."""
    return Encoded(
        row_id=name,
        group="g",
        prompt=[rng.randrange(VOCABULARY) for _ in range(prompt)],
        responses=[make_response(rng, length, "desirable" if desirable else "undesirable")],
    )


def make_completion(
    rng: random.Random, prompt: int, length: int, name: str = "", *, share: float = 1.0, weight: float = 1.0
) -> Encoded:
    """A row with one response."""
    return Encoded(
        row_id=name or f"row-{rng.random()}",
        group="g",
        prompt=[rng.randrange(VOCABULARY) for _ in range(prompt)],
        responses=[make_response(rng, length, "completion", first_scored=0 if prompt else 1, share=share)],
        weight=weight,
    )


def make_ranked(
    rng: random.Random,
    prompt: int,
    lengths: Sequence[int],
    name: str = "",
    *,
    ranks: Sequence[int] | None = None,
    margin: float = 0.0,
    weight: float = 1.0,
) -> Encoded:
    """A row whose answers are read at their last token; without a prompt their first tokens are not scored."""
    first = 0 if prompt else 1
    responses = [make_response(rng, length, "completion", first_scored=first) for length in lengths]
    places = range(len(responses)) if ranks is None else ranks
    return Encoded(
        row_id=name or f"ranked-{rng.random()}",
        group=name or "g",
        prompt=[rng.randrange(VOCABULARY) for _ in range(prompt)],
        responses=[
            replace(response, reads=(len(response.ids) - 1,), rank=rank)
            for response, rank in zip(responses, places, strict=True)
        ],
        weight=weight,
        margin=margin,
    )
