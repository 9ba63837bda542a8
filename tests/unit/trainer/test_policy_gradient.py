"""Clipped losses of policy and critic, by hand, with their gradients on both sides of a clip."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plumbline_trainer.losses.policy_gradient import clipped_policy_loss, clipped_value_loss


def policy_of(ratio: float, advantage: float, **fields: float) -> tuple[float, float, bool]:
    """Loss, its derivative by log π, and whether a clip was active."""
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    terms = clipped_policy_loss(
        new, torch.zeros(1), torch.tensor([advantage]), **{"clip_low": 0.2, "clip_high": 0.2, **fields}
    )
    terms.loss.sum().backward()
    assert new.grad is not None
    assert terms.ratio.item() == pytest.approx(ratio)
    return terms.loss.item(), new.grad.item(), bool(terms.clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.5, 1.0, -1.2, 0.0, True),  # a good action is not made ever more likely
        (0.5, 1.0, -0.5, -0.5, False),  # but brought back where it became rarer
        (1.5, -1.0, 1.5, 1.5, False),
        (0.5, -1.0, 0.8, 0.0, True),
        (1.1, 2.0, -2.2, -2.2, False),
        (0.9, -2.0, 1.8, 1.8, False),
        (1.5, 0.0, 0.0, 0.0, False),
    ],
)
def test_clipped_policy_loss(ratio: float, advantage: float, loss: float, gradient: float, clipped: bool) -> None:
    found = policy_of(ratio, advantage)
    assert found[:2] == pytest.approx((loss, gradient), abs=1e-6)
    assert found[2] is clipped


@pytest.mark.parametrize(("edge", "advantage", "way"), [(1.2, 1.0, 1), (0.8, -1.0, -1)])
def test_the_gradient_ends_at_the_clip(edge: float, advantage: float, way: int) -> None:
    """Just inside, the whole gradient −A·ρ; just outside, none; the loss is continuous."""
    inside, outside = edge * math.exp(-way * 1e-3), edge * math.exp(way * 1e-3)
    loss, gradient, clipped = policy_of(inside, advantage)
    assert (gradient, clipped) == (pytest.approx(-advantage * inside), False)
    beyond, gradient, clipped = policy_of(outside, advantage)
    assert (gradient, clipped) == (0.0, True)
    assert beyond == pytest.approx(loss, rel=2e-3)


def test_the_bounds_are_apart() -> None:
    """Clip-higher: with ε_high = 0.28 a ratio of 1.25 still passes, while ε_low = 0.2 stays."""
    assert policy_of(1.25, 1.0, clip_high=0.28) == (pytest.approx(-1.25), pytest.approx(-1.25), False)
    assert policy_of(1.3, 1.0, clip_high=0.28)[1:] == (0.0, True)
    assert policy_of(0.75, -1.0, clip_high=0.28)[1:] == (0.0, True)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (5.0, -2.0, 6.0, 0.0, True),  # at most −c·A
        (2.0, -2.0, 4.0, 4.0, False),
        (5.0, 2.0, -2.4, 0.0, True),  # the ordinary clip
        (0.5, -2.0, 1.6, 0.0, True),
    ],
)
def test_dual_clip(ratio: float, advantage: float, loss: float, gradient: float, clipped: bool) -> None:
    found = policy_of(ratio, advantage, dual_clip=3.0)
    assert found[:2] == pytest.approx((loss, gradient), abs=1e-6)
    assert found[2] is clipped


def test_before_the_first_step_it_is_the_policy_gradient() -> None:
    """π = π_old: ratio 1, nothing clipped, gradient −A."""
    new = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([0.5, -1.5, 0.0])
    terms = clipped_policy_loss(new, new.detach(), advantages, clip_low=0.2, clip_high=0.2)
    terms.loss.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx((-advantages).tolist())
    assert terms.ratio.tolist() == [1.0] * 3
    assert not terms.clipped.any()


def test_trap_16_an_infinite_ratio_times_no_advantage_is_a_number() -> None:
    """A log-ratio of 200 overflows; its answer's advantage may be 0, and then it must teach nothing."""
    new = torch.tensor([0.0, 0.0, -200.0], requires_grad=True)
    old = torch.tensor([-200.0, -200.0, 0.0])
    terms = clipped_policy_loss(new, old, torch.tensor([0.0, -1.0, 1.0]), clip_low=0.2, clip_high=0.2)
    terms.loss.sum().backward()
    assert new.grad is not None
    assert torch.isfinite(terms.loss).all()
    assert torch.isfinite(new.grad).all()
    assert (terms.loss[0].item(), new.grad[0].item()) == (0.0, 0.0)


def test_trap_5_a_sum_over_parts_is_the_sum_over_the_whole() -> None:
    """The loss is elementwise: normalised by all tokens, accumulation changes nothing; the mean of means does."""
    rng = torch.Generator().manual_seed(3)
    new, old, advantages = (torch.randn(7, generator=rng) * 0.3 for _ in range(3))

    def sums(part: slice) -> torch.Tensor:
        return clipped_policy_loss(new[part], old[part], advantages[part], clip_low=0.2, clip_high=0.2).loss

    whole = sums(slice(None)).sum() / 7
    parts = (sums(slice(0, 2)).sum() + sums(slice(2, 7)).sum()) / 7
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    assert (sums(slice(0, 2)).mean() + sums(slice(2, 7)).mean()).item() / 2 != pytest.approx(whole.item(), rel=1e-2)


def value_of(value: float, old: float, target: float, clip: float | None) -> tuple[float, float, bool]:
    """Loss, its derivative by V, and whether the clipped square was the larger."""
    values = torch.tensor([value], requires_grad=True)
    loss, clipped = clipped_value_loss(values, torch.tensor([old]), torch.tensor([target]), clip=clip)
    loss.sum().backward()
    assert values.grad is not None
    return loss.item(), values.grad.item(), bool(clipped)


@pytest.mark.parametrize(
    ("value", "target", "clip", "loss", "gradient", "clipped"),
    [
        (2.0, 3.0, 0.2, 1.62, 0.0, True),  # V_old 1: (1.2 − 3)² is above (2 − 3)²
        (2.0, 0.0, 0.2, 2.0, 2.0, False),  # (2 − 0)² is above (1.2 − 0)²
        (1.1, 3.0, 0.2, 1.805, -1.9, False),  # inside: both are the same
        (0.5, -1.0, 0.2, 1.62, 0.0, True),
        (2.0, 3.0, None, 0.5, -1.0, False),
    ],
)
def test_clipped_value_loss(
    value: float, target: float, clip: float | None, loss: float, gradient: float, clipped: bool
) -> None:
    found = value_of(value, 1.0, target, clip)
    assert found[:2] == pytest.approx((loss, gradient), abs=1e-5)
    assert found[2] is clipped


def test_the_values_gradient_ends_at_the_clip() -> None:
    """V_old 1, R 3, ε 0.2: below 1.2 the whole gradient V − R, above it none."""
    assert value_of(1.2 - 1e-3, 1.0, 3.0, 0.2)[1:] == (pytest.approx(-1.801, abs=1e-5), False)
    assert value_of(1.2 + 1e-3, 1.0, 3.0, 0.2)[1:] == (0.0, True)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3), st.floats(0.05, 1))
def test_clipping_never_lowers_a_loss(one: float, two: float, three: float, clip: float) -> None:
    """Both are pessimistic bounds: at least the unclipped loss."""
    new, old, advantage = torch.tensor([one]), torch.tensor([two]), torch.tensor([three])
    terms = clipped_policy_loss(new, old, advantage, clip_low=min(clip, 0.9), clip_high=clip)
    assert terms.loss.item() >= (-advantage * (new - old).exp()).item() - 1e-3
    loss, _ = clipped_value_loss(new, old, advantage, clip=clip)
    assert loss.item() >= 0.5 * (one - three) ** 2 - 1e-4
