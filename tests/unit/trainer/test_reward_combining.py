"""Several rewards as one score: weights, running normalisation, clips, gold apart; resume and ranks change nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from plumbline_api.online import Reward
from plumbline_trainer.data.rows import Message
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.errors import InputError
from plumbline_trainer.rewards.combining import RewardSet, RunningMoments
from plumbline_trainer.rewards.interface import Candidate
from torch import Tensor


def candidates(count: int) -> list[Candidate]:
    return [Candidate((Message("user", f"{n}?"),), f"answer {n}", n, None, f"row-{n}") for n in range(count)]


class Fixed:
    """A component that says what it was given, and counts how often it is asked."""

    def __init__(self, *batches: Sequence[float]) -> None:
        self.batches = list(batches)
        self.asked = 0

    def score(self, candidates: Sequence[Candidate], ranks: Ranks) -> Tensor:
        values = self.batches[min(self.asked, len(self.batches) - 1)]
        self.asked += 1
        return torch.tensor(values, dtype=torch.float32)


def reward(name: str, **fields: Any) -> Reward:
    return Reward.model_validate({"rule": "length", "name": name, **fields})


def test_weighted_values_add_up_and_are_clipped_before_they_are_weighted() -> None:
    rewards = RewardSet(
        [reward("a", weight=2), reward("b", weight=-0.5, clip=3)], [Fixed([1, 2, -4]), Fixed([1, -10, 10])]
    )
    found = rewards.score(candidates(3))
    assert found.total.tolist() == [2 - 0.5, 4 + 1.5, -8 - 1.5]
    assert found.total.dtype == torch.float32
    assert {name: values.tolist() for name, values in found.components.items()} == {
        "a": [1, 2, -4],
        "b": [1, -10, 10],
    }
    assert found.gold is None
    assert rewards.names == ["a", "b"]


def test_gold_is_scored_on_held_out_answers_only_and_never_part_of_the_total() -> None:
    gold = Fixed([5, 7])
    rewards = RewardSet([reward("a"), reward("true", gold=True, weight=2)], [Fixed([1, 2]), gold])
    found = rewards.score(candidates(2))
    assert found.gold is None
    assert gold.asked == 0
    assert list(found.components) == ["a"]
    held_out = rewards.score(candidates(2), held_out=True)
    assert held_out.total.tolist() == [1, 2]
    assert held_out.gold is not None
    assert held_out.gold.tolist() == [10, 14]
    assert held_out.components["true"].tolist() == [5, 7]
    assert (rewards.names, rewards.gold_names) == (["a"], ["true"])


def test_normalised_values_are_relative_to_all_values_so_far() -> None:
    first, second = [1.0, 2.0, 6.0], [10.0, -3.0]
    rewards = RewardSet([reward("a", normalize=True)], [Fixed(first, second)])
    for seen, batch in ((first, first), (first + second, second)):
        mean = sum(seen) / len(seen)
        std = math.sqrt(sum((value - mean) ** 2 for value in seen) / len(seen))
        found = rewards.score(candidates(len(batch)))
        assert found.total.tolist() == pytest.approx([(value - mean) / std for value in batch], rel=1e-6)
        assert found.components["a"].tolist() == batch


def test_held_out_answers_are_normalised_and_leave_the_moments_alone() -> None:
    rewards = RewardSet([reward("a", normalize=True)], [Fixed([0.0, 2.0], [5.0, 7.0])])
    rewards.score(candidates(2))
    before = rewards.state()
    assert rewards.score(candidates(2), held_out=True).total.tolist() == [4.0, 6.0]
    assert rewards.state() == before


def test_before_the_first_rollout_held_out_answers_are_normalised_by_themselves() -> None:
    rewards = RewardSet([reward("a", normalize=True)], [Fixed([0.0, 2.0])])
    assert rewards.score(candidates(2), held_out=True).total.tolist() == [-1.0, 1.0]
    assert rewards.state() == {"a": {"count": 0, "mean": 0.0, "squares": 0.0}}


def test_a_component_that_does_not_vary_is_zero_once_normalised() -> None:
    rewards = RewardSet([reward("a", normalize=True, weight=3)], [Fixed([0.3, 0.3, 0.3])])
    assert rewards.score(candidates(3)).total.abs().max() < 1e-6


def test_the_normaliser_goes_on_bit_for_bit_after_a_resume() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(37) * 3 + 1).tolist() for _ in range(6)]

    def fresh(*left: Sequence[float]) -> RewardSet:
        return RewardSet([reward("a", normalize=True, clip=2), reward("b")], [Fixed(*left), Fixed(*left)])

    whole = fresh(*batches)
    totals = [whole.score(candidates(37)).total for _ in batches]
    begun = fresh(*batches[:3])
    for total in totals[:3]:
        assert torch.equal(begun.score(candidates(37)).total, total)
    resumed = fresh(*batches[3:])
    resumed.restore(json.loads(json.dumps(begun.state())))
    for total in totals[3:]:
        assert torch.equal(resumed.score(candidates(37)).total, total)
    assert resumed.state() == whole.state()


def test_moments_of_batches_are_those_of_all_values() -> None:
    torch.manual_seed(1)
    values = torch.randn(1000) * 5 - 2
    moments = RunningMoments()
    for part in values.split(64):
        moments.add(part)
    assert moments.mean == pytest.approx(float(values.double().mean()), rel=1e-12)
    assert moments.std == pytest.approx(float(values.double().std(correction=0)), rel=1e-12)


def test_state_of_other_rewards_is_refused() -> None:
    rewards = RewardSet([reward("a", normalize=True)], [Fixed([1.0])])
    with pytest.raises(InputError, match="moments of b, but a is normalised"):
        rewards.restore({"b": {"count": 1, "mean": 0.0, "squares": 0.0}})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_with_the_reward_and_the_row(value: float) -> None:
    rewards = RewardSet([reward("a"), reward("b")], [Fixed([1, 1]), Fixed([0, value])])
    with pytest.raises(InputError, match=r'rewards\[1\] \("b"\): the score of an answer to row row-1 is -?(nan|inf)'):
        rewards.score(candidates(2))


def test_no_answers_are_no_scores() -> None:
    rewards = RewardSet([reward("a", normalize=True)], [Fixed([1.0])])
    found = rewards.score([])
    assert found.total.shape == (0,)
    assert found.components["a"].shape == (0,)
    assert rewards.state()["a"]["count"] == 0
