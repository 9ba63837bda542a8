"""Rewards per token, GAE, whitening and the advantages of groups, by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plumbline_trainer.losses.advantages import (
    clip_rewards,
    discounted_sums,
    gae,
    group_advantages,
    leave_one_out,
    penalise_unfinished,
    token_rewards,
    whiten,
)
from plumbline_trainer.losses.moments import RunningMoments

REWARDS = torch.tensor([1.0, 2.0, 3.0])
VALUES = torch.tensor([0.5, 1.0, 1.5])


def floats(size: int | None = None) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(-100, 100, width=32), min_size=size or 2, max_size=size or 40)


def test_scores_of_answers_without_an_end_lose_the_penalty() -> None:
    found = penalise_unfinished(torch.tensor([2.0, 3.0]), torch.tensor([True, False]), penalty=1.5)
    assert found.tolist() == [2.0, 1.5]


def test_scores_are_clipped_on_both_sides() -> None:
    assert clip_rewards(torch.tensor([-20.0, -3.0, 11.0]), bound=10.0).tolist() == [-10.0, -3.0, 10.0]


def test_trap_15_the_score_stands_at_the_last_action() -> None:
    """Not one step after it, where there is no action: β·KL at every token, the score on top of the last one's."""
    kl = torch.tensor([0.1, 0.2, 0.3])
    assert token_rewards(kl, 2.0, 0.5).tolist() == pytest.approx([-0.05, -0.1, 1.85])
    assert token_rewards(torch.tensor([0.4]), 1.0, 0.5).tolist() == pytest.approx([0.8])
    assert kl.tolist() == pytest.approx([0.1, 0.2, 0.3]), "the divergence is logged after this"


@pytest.mark.parametrize(
    ("gamma", "lam", "wanted"),
    [
        # δ = 1 + 0.9·1 − 0.5, 2 + 0.9·1.5 − 1, 3 − 1.5
        (0.9, 0.0, [1.4, 2.35, 1.5]),
        # A_2 = 1.5; A_1 = 2.35 + 0.45·1.5; A_0 = 1.4 + 0.45·3.025
        (0.9, 0.5, [2.76125, 3.025, 1.5]),
        # the return less the value
        (1.0, 1.0, [5.5, 4.0, 1.5]),
        (0.9, 1.0, [1 + 1.8 + 2.43 - 0.5, 2 + 2.7 - 1, 1.5]),
        # δ = 1.5, 2.5, 1.5; A_1 = 2.5 + 0.95·1.5; A_0 = 1.5 + 0.95·3.925
        (1.0, 0.95, [5.22875, 3.925, 1.5]),
        (0.0, 0.95, [0.5, 1.0, 1.5]),
    ],
)
def test_gae(gamma: float, lam: float, wanted: list[float]) -> None:
    advantages, returns = gae(REWARDS, VALUES, gamma=gamma, lam=lam)
    assert advantages.dtype == returns.dtype == torch.float32
    assert advantages.tolist() == pytest.approx(wanted, rel=1e-6)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(wanted, VALUES.tolist(), strict=True)], rel=1e-6)


@settings(max_examples=50)
@given(floats(9), floats(9), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_its_defining_sum(rewards: list[float], values: list[float], gamma: float, lam: float) -> None:
    """Schulman et al. 2016, eq. 16, term by term."""
    ends = [*values[1:], 0.0]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, ends, strict=True)]
    wanted = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 9)) for t in range(9)]
    found, _ = gae(torch.tensor(rewards), torch.tensor(values), gamma=gamma, lam=lam)
    assert found.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-3)


def test_trap_15_below_lambda_1_the_place_of_the_score_changes_every_return() -> None:
    """An action after the end, as trl has it, with a value of its own: with λ = 1 only that value's place moves."""
    values = torch.tensor([0.2, 0.4, 0.6])
    paper, late = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    longer = torch.cat([values, torch.tensor([0.3])])
    (_, ours), (_, theirs) = gae(paper, values, gamma=1, lam=0.95), gae(late, longer, gamma=1, lam=0.95)
    # R_2 = V_2 + (1 − V_2) against V_2 + (V_3 − V_2) + 0.95·(1 − V_3)
    assert ours[2].item() == pytest.approx(1.0)
    assert theirs[2].item() == pytest.approx(0.3 + 0.95 * 0.7)
    (_, ours), (_, theirs) = gae(paper, values, gamma=1, lam=1), gae(late, longer, gamma=1, lam=1)
    assert ours.tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert theirs[:3].tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_a_long_answer_loses_no_digits() -> None:
    """4096 rewards of 0.1: the sum is taken in float64."""
    found = discounted_sums(torch.full((4096,), 0.1), 1.0)
    assert found[0].item() == pytest.approx(409.6, rel=1e-6)
    assert found[-1].item() == pytest.approx(0.1)


def test_discounted_sums() -> None:
    assert discounted_sums(REWARDS, 0.5).tolist() == [2.75, 3.5, 3.0]
    assert discounted_sums(REWARDS, 1.0).tolist() == [6.0, 5.0, 3.0]
    assert discounted_sums(REWARDS, 0.0).tolist() == [1.0, 2.0, 3.0]
    assert REWARDS.tolist() == [1.0, 2.0, 3.0]


def test_reinforce_plus_plus() -> None:
    """A_t = score − β·Σ_{i≥t} KL_i: 2 − ½·0.6, 2 − ½·0.5, 2 − ½·0.3; then whitened over all answers' tokens."""
    first = discounted_sums(token_rewards(torch.tensor([0.1, 0.2, 0.3]), 2.0, 0.5), 1.0)
    assert first.tolist() == pytest.approx([1.7, 1.75, 1.85])
    second = discounted_sums(token_rewards(torch.tensor([0.2]), 1.8, 0.5), 1.0)
    found = whiten(torch.cat([first, second]))
    # mean 1.75, deviations −0.05, 0, 0.1, −0.05: variance 0.015/3
    assert found.tolist() == pytest.approx([-0.707107, 0.0, 1.414214, -0.707107], abs=1e-5)


def test_reinforce_plus_plus_with_a_baseline_first_subtracts_the_mean_of_the_group() -> None:
    """Two prompts, easy and hard: without it every answer to the easy one is better than every answer to the hard one."""
    easy, hard = torch.tensor([11.0, 9.0]), torch.tensor([1.0, -1.0])
    plain = whiten(torch.cat([easy, hard]))
    assert (plain[:2] > 0).all()
    assert (plain[2:] < 0).all()
    found = whiten(torch.cat([group_advantages(scores, scale="none") for scores in (easy, hard)]))
    # ±1: variance 4/3
    assert found.tolist() == pytest.approx([0.866025, -0.866025, 0.866025, -0.866025], abs=1e-6)


def test_whitening() -> None:
    assert whiten(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([-1.0, 0.0, 1.0])
    half = 0.5**0.5
    assert whiten(torch.tensor([0.0, 4.0])).tolist() == pytest.approx([-half, half])  # unbiased variance 8
    assert whiten(torch.tensor([0.0, 4.0]), shift_mean=False).tolist() == pytest.approx([2 - half, 2 + half])


def test_whitening_of_what_does_not_vary() -> None:
    assert whiten(torch.full((4,), 3.0)).tolist() == [0.0] * 4
    assert whiten(torch.tensor([3.0])).tolist() == [0.0]


def test_trap_19_whitening_each_ranks_share_is_not_whitening_the_rollout() -> None:
    """Advantages of 1 and 3 on one rank, 11 and 13 on the other: apart, 1 and 11 would push alike."""
    apart = torch.cat([whiten(torch.tensor([1.0, 3.0])), whiten(torch.tensor([11.0, 13.0]))])
    half = 0.5**0.5
    assert apart.tolist() == pytest.approx([-half, half, -half, half])
    # mean 7, deviations −6, −4, 4, 6: variance 104/3
    together = whiten(torch.tensor([1.0, 3.0, 11.0, 13.0]))
    std = (104 / 3) ** 0.5
    assert together.tolist() == pytest.approx([-6 / std, -4 / std, 4 / std, 6 / std])


def test_grpo_divides_by_the_groups_deviation() -> None:
    """Mean ½, unbiased variance 4·¼/3."""
    size = 0.5 / ((1 / 3) ** 0.5 + 1e-4)
    found = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), scale="group")
    assert found.tolist() == pytest.approx([size, -size, -size, size])


def test_a_group_whose_answers_are_equally_good_teaches_nothing() -> None:
    for rewards in (torch.full((4,), 0.7), torch.zeros(8)):
        assert group_advantages(rewards, scale="group").abs().max() <= 1e-3
    assert group_advantages(torch.ones(4), scale="group").tolist() == [0.0] * 4


def test_the_other_scales_of_groups() -> None:
    rewards = torch.tensor([1.0, 0.0])
    assert group_advantages(rewards, scale="none").tolist() == [0.5, -0.5]
    wanted = pytest.approx([0.5 / 2.0001, -0.5 / 2.0001])
    assert group_advantages(rewards, scale="batch", std=2.0).tolist() == wanted
    assert group_advantages(rewards, scale="batch", std=torch.tensor(2.0)).tolist() == wanted


def test_leave_one_out() -> None:
    """1, 2, 6: the others' means are 4, 3.5 and 1.5."""
    assert leave_one_out(torch.tensor([1.0, 2.0, 6.0])).tolist() == [-3.0, -1.5, 4.5]


@given(floats())
def test_leave_one_out_is_the_centred_reward_stretched(rewards: list[float]) -> None:
    """n/(n − 1)·(R − mean), so a group's advantages cancel."""
    values, n = torch.tensor(rewards), len(rewards)
    found = leave_one_out(values)
    assert found.sum().item() == pytest.approx(0.0, abs=1e-2)
    wanted = n / (n - 1) * group_advantages(values, scale="none")
    assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-3)


def test_one_answer_is_no_group() -> None:
    with pytest.raises(ValueError, match="2 answers"):
        leave_one_out(torch.ones(1))
    with pytest.raises(ValueError, match="2 answers"):
        group_advantages(torch.ones(1), scale="group")


def test_a_deviation_belongs_to_the_scale_batch() -> None:
    with pytest.raises(ValueError, match="batch"):
        group_advantages(torch.ones(2), scale="batch")
    with pytest.raises(ValueError, match="batch"):
        group_advantages(torch.ones(2), scale="group", std=1.0)


def test_running_moments_by_hand() -> None:
    """1, 2, 3, 4: mean 2.5, squared deviations 5."""
    moments = RunningMoments()
    assert moments.std == 0.0
    moments.update(torch.tensor([1.0]))
    assert (moments.mean, moments.std) == (1.0, 0.0)
    moments.update(torch.tensor([2.0, 3.0, 4.0]))
    assert (moments.count, moments.mean, moments.squares) == (4, 2.5, 5.0)
    assert moments.std == pytest.approx((5 / 3) ** 0.5)
    found = moments.normalise(torch.tensor([2.5, 5.0]))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([0.0, 2.5 / (5 / 3) ** 0.5])
    moments.update([])
    assert moments.count == 4


def test_rewards_that_never_vary_are_normalised_to_zero() -> None:
    moments = RunningMoments()
    moments.update(torch.full((8,), 0.3))
    assert moments.normalise(torch.full((8,), 0.3)).abs().max() <= 1e-6


@given(st.lists(floats(), min_size=1, max_size=6), st.integers(0, 5))
def test_however_the_stream_is_cut_and_merged_its_moments_are_the_same(batches: list[list[float]], cut: int) -> None:
    whole = np.array([value for batch in batches for value in batch], dtype=np.float64)
    first, second = RunningMoments(), RunningMoments()
    for number, batch in enumerate(batches):
        (first if number < cut else second).update(torch.tensor(batch))
    first.merge(second)
    assert first.count == len(whole)
    assert first.mean == pytest.approx(whole.mean(), abs=1e-9)
    assert first.std == pytest.approx(whole.std(ddof=1), abs=1e-6)


def test_moments_far_from_zero_keep_their_deviation() -> None:
    """1e8 ± 1: the difference of mean square and squared mean would be noise."""
    moments = RunningMoments()
    for _ in range(50):
        moments.update([1e8 - 1, 1e8 + 1])
    assert moments.std == pytest.approx((100 / 99) ** 0.5, rel=1e-9)


def test_trap_27_running_moments_go_on_from_their_state() -> None:
    whole, first = RunningMoments(), RunningMoments()
    batches = [torch.tensor([0.1, 0.7]), torch.tensor([1.3]), torch.tensor([-4.0, 2.0, 0.3])]
    for batch in batches:
        whole.update(batch)
    for batch in batches[:2]:
        first.update(batch)
    second = RunningMoments.restored(json.loads(json.dumps(first.state())))
    second.update(batches[2])
    assert second == whole
