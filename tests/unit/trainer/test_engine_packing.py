"""Packed batches: layout, positions, masks."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plumbline_trainer.data.encode import Encoded, EncodedResponse
from plumbline_trainer.engine.packing import pack, packed_length
from plumbline_trainer.engine.segments import Block, SegmentPlan, visibility_mask
from support.encoded import make_completion, make_pair

INF = float("-inf")


def test_a_pair_is_laid_out_prompt_first_and_once() -> None:
    row = Encoded(
        "a",
        "g",
        [10, 11],
        [EncodedResponse([20, 21, 22], [True] * 3, "chosen"), EncodedResponse([30, 31], [True] * 2, "rejected")],
    )
    batch = pack([row])
    # The last token of each response is only predicted, never looked at.
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 30]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.sources.tolist() == [1, 2, 3, 1, 4]
    assert batch.targets.tolist() == [20, 21, 22, 30, 31]
    assert [list(answer.scored) for answer in batch.answers] == [[0, 1, 2], [3, 4]]
    assert batch.sum_by_answer(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])).tolist() == [7.0, 24.0]


def test_unscored_tokens_are_read_but_not_predicted() -> None:
    row = Encoded("a", "g", [], [EncodedResponse([5, 6, 7, 8, 9], [True, False, True, True, False], "text")])
    batch = pack([row])
    assert batch.input_ids.tolist() == [[5, 6, 7]], "nothing after the last scored token is needed"
    assert batch.sources.tolist() == [1, 2], "the first token of a text has nothing before it"
    assert batch.targets.tolist() == [7, 8]
    assert batch.answers[0].offsets == (2, 3)


def test_rows_follow_each_other_with_positions_of_their_own() -> None:
    rng = random.Random(0)
    rows = [make_completion(rng, 3, 2), make_completion(rng, 0, 4)]
    batch = pack(rows)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.tokens == sum(packed_length(row) for row in rows)
    assert [answer.row for answer in batch.answers] == [0, 1]


def test_mask_of_a_pair_by_hand() -> None:
    mask = visibility_mask(Block(start=7, prompt=2, responses=(1, 2)))
    assert mask.tolist() == [
        [0, INF, INF, INF, INF],
        [0, 0, INF, INF, INF],
        [0, 0, 0, INF, INF],
        [0, 0, INF, 0, INF],
        [0, 0, INF, 0, 0],
    ]


def test_window_counts_positions_not_places() -> None:
    mask = visibility_mask(Block(start=0, prompt=2, responses=(1, 2)), window=2)
    # The second response stands at positions 2 and 3 although it lies at places 3 and 4.
    assert mask[3].tolist() == [INF, 0, INF, 0, INF]
    assert mask[4].tolist() == [INF, INF, INF, 0, 0]


@pytest.mark.parametrize(("prompt", "responses", "causal"), [(3, (2,), True), (3, (2, 0), True), (0, (4, 1), False)])
def test_blocks_with_one_response_are_causal(prompt: int, responses: tuple[int, ...], causal: bool) -> None:
    block = Block(start=0, prompt=prompt, responses=responses)
    assert block.is_causal is causal
    triangle = torch.full((block.length, block.length), INF).triu(1)
    assert torch.equal(visibility_mask(block), triangle) is causal


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(0, 6),
    responses=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 8),
)
def test_mask_agrees_with_a_definition_token_by_token(prompt: int, responses: list[int], window: int | None) -> None:
    block = Block(start=0, prompt=prompt, responses=tuple(responses))
    # Each token as (owner, position): owner −1 for the prompt, else the response.
    tokens = [(-1, k) for k in range(prompt)]
    tokens += [(j, prompt + k) for j, length in enumerate(responses) for k in range(length)]
    mask = visibility_mask(block, window)
    for q, (owner, position) in enumerate(tokens):
        for k, (other, place) in enumerate(tokens):
            seen = place <= position and other in (-1, owner) and (window is None or position - place < window)
            assert (mask[q, k] == 0) == seen


@settings(max_examples=60, deadline=None)
@given(
    past=st.integers(1, 6),
    prompt=st.integers(0, 4),
    responses=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 8),
)
def test_what_is_past_is_seen_like_a_prompt(past: int, prompt: int, responses: list[int], window: int | None) -> None:
    behind = Block(start=0, prompt=prompt, responses=tuple(responses), past=range(3, 3 + past))
    whole = Block(start=0, prompt=past + prompt, responses=tuple(responses))
    assert not behind.is_causal
    assert torch.equal(visibility_mask(behind, window), visibility_mask(whole, window)[past:])
    assert SegmentPlan((behind,)).positions() == SegmentPlan((whole,)).positions()[past:]


def test_pairs_share_their_prompt() -> None:
    rng = random.Random(3)
    row = make_pair(rng, 100, 5, 7)
    assert packed_length(row) == 100 + 4 + 6


def test_heads_can_be_read_before_an_answer() -> None:
    """−1 is the last token of the prompt, whichever answer asks: a critic values the state before every token."""
    answers = [
        EncodedResponse([5, 6], [True, True], "completion", reads=(-1, 0)),
        EncodedResponse([7, 8, 9], [True] * 3, "completion", reads=(-1, 0, 1)),
    ]
    batch = pack([Encoded("a", "a", [1, 2, 3], answers), Encoded("b", "b", [4], answers[:1])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 7, 8, 4, 5]]
    assert batch.reads.tolist() == [2, 3, 2, 4, 5, 6, 7]
    assert batch.sources.tolist() == batch.reads.tolist()
