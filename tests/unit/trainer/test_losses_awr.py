"""Weights of advantage-weighted regression, by hand and by their limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plumbline_trainer.losses.awr import advantage_weights, expectile

SCORES = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12)


def doubles(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_expectiles_by_hand() -> None:
    """Of 0, 1, 2, 5: the mean is 2; at 0.9 V = 4 balances 0.9·(5 − 4) with 0.1·(4 + 3 + 2)."""
    values = doubles([2.0, 0.0, 5.0, 1.0])
    assert expectile(values, 0.5).item() == pytest.approx(2.0)
    assert expectile(values, 0.9).item() == pytest.approx(4.0)
    assert expectile(values, 0.1).item() == pytest.approx(2 / 3)  # 0.1·(1/3 + 4/3 + 13/3) = 0.9·2/3
    assert expectile(doubles([3.0]), 0.7).item() == 3.0


@given(SCORES, st.floats(0.01, 0.99))
def test_an_expectile_balances_the_distances(scores: list[float], tau: float) -> None:
    """The first-order condition: Σ |τ − 1(x < V)|·(x − V) = 0."""
    values = doubles(scores)
    found = expectile(values, tau)
    pulls = torch.where(values < found, 1 - tau, tau).double() * (values - found)
    assert abs(pulls.sum().item()) <= 1e-5 * (1 + values.abs().sum().item())
    assert values.min() - 1e-9 <= found <= values.max() + 1e-9


@given(SCORES)
def test_an_expectile_moves_from_the_worst_to_the_best(scores: list[float]) -> None:
    values = doubles(scores)
    found = [expectile(values, tau).item() for tau in (1e-9, 0.2, 0.5, 0.8, 1 - 1e-9)]
    assert found == sorted(found) or max(found) - min(found) < 1e-6
    assert found[0] == pytest.approx(values.min().item(), abs=1e-5)
    assert found[-1] == pytest.approx(values.max().item(), abs=1e-5)
    assert found[2] == pytest.approx(values.mean().item(), abs=1e-9)


def test_weights_by_hand() -> None:
    """β = 2: exp(½) = 1.6487, exp(0) = 1, exp(−1) = 0.3679; exp(3) = 20.09 is cut at 20."""
    found = advantage_weights(doubles([1.0, 0.0, -2.0, 6.0]), beta=2.0, clip=20.0)
    assert found.tolist() == pytest.approx([1.6487213, 1.0, 0.36787944, 20.0])


@given(SCORES, st.floats(0.05, 10))
def test_weights_rise_with_the_score_and_stay_below_the_clip(scores: list[float], beta: float) -> None:
    values = doubles(sorted(scores))
    found = advantage_weights(values, beta=beta, clip=5.0)
    assert bool((found[1:] >= found[:-1]).all())
    assert bool((found >= 0).all())
    assert found.max().item() <= 5.0 + 1e-9


@given(SCORES)
def test_a_large_beta_weighs_all_alike_and_a_small_one_takes_what_is_above_the_baseline(scores: list[float]) -> None:
    advantages = doubles(scores) - expectile(doubles(scores), 0.5)
    assert advantage_weights(advantages, beta=1e9, clip=20.0).tolist() == pytest.approx([1.0] * len(scores), abs=1e-5)
    sharp = advantage_weights(advantages, beta=1e-9, clip=20.0)
    for advantage, weight in zip(advantages.tolist(), sharp.tolist(), strict=True):
        if abs(advantage) > 1e-6:
            assert weight == pytest.approx(20.0 if advantage > 0 else 0.0)


def test_no_score_overflows() -> None:
    found = advantage_weights(doubles([1e300, -1e300]), beta=1e-3, clip=20.0)
    assert found.tolist() == pytest.approx([20.0, 0.0])
    assert math.isfinite(found.sum().item())
