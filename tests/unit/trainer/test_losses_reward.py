"""Losses of reward models against numbers worked by hand and against their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from plumbline_trainer.losses.reward import bradley_terry, centring, plackett_luce
from torch import Tensor


def gradient_of(loss: Tensor, at: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss.sum(), at)
    return found


def test_bradley_terry_by_hand() -> None:
    # r_w − r_l = 2 − 0.5 = 1.5; with margin 1 there are 0.5 left
    chosen, rejected = torch.tensor([2.0, 2.0], requires_grad=True), torch.tensor([0.5, 0.5], requires_grad=True)
    loss = bradley_terry(chosen, rejected, torch.tensor([0.0, 1.0]))
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(-0.5))])
    slopes = [-1 / (1 + math.exp(1.5)), -1 / (1 + math.exp(0.5))]  # −σ(−Δ)
    assert gradient_of(bradley_terry(chosen, rejected, torch.tensor([0.0, 1.0])), chosen).tolist() == pytest.approx(
        slopes
    )
    assert gradient_of(loss, rejected).tolist() == pytest.approx([-slope for slope in slopes])


def test_a_margin_asks_for_more_not_for_less() -> None:
    """Trap 21: with the sign the other way round a margin would make the loss smaller."""
    chosen, rejected = torch.tensor([1.0]), torch.tensor([0.0])
    assert bradley_terry(chosen, rejected, 0.5) > bradley_terry(chosen, rejected)


def test_bradley_terry_and_gradient_against_the_formula_in_float64() -> None:
    rng = torch.Generator().manual_seed(1)
    chosen = (torch.randn(64, generator=rng) * 10).requires_grad_()
    rejected = (torch.randn(64, generator=rng) * 10).requires_grad_()
    margin = torch.rand(64, generator=rng)
    gap = chosen.detach().double() - rejected.detach().double() - margin.double()
    loss = bradley_terry(chosen, rejected, margin)
    torch.testing.assert_close(loss.double(), torch.log1p(torch.exp(-gap)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_of(loss, chosen).double(), -1 / (1 + torch.exp(gap)), rtol=1e-5, atol=1e-7)


def test_plackett_luce_by_hand() -> None:
    # Rewards ln 3, ln 2, ln 1, best first: 3/6 · 2/3 · 1/1 = 1/3.
    rewards = torch.tensor([[math.log(3), math.log(2), 0.0]], requires_grad=True)
    loss = plackett_luce(rewards, torch.tensor([[0, 1, 2]]))
    assert loss.tolist() == pytest.approx([math.log(3)])
    # d/dr_1 = 3/6 − 1; d/dr_2 = 2/6 + 2/3 − 1; d/dr_3 = 1/6 + 1/3 + 1 − 1
    assert gradient_of(loss, rewards)[0].tolist() == pytest.approx([-1 / 2, 0.0, 1 / 2], abs=1e-6)


def test_the_order_in_which_answers_stand_does_not_matter() -> None:
    rewards, ranks = torch.tensor([[0.3, -1.0, 2.0, 0.0]]), torch.tensor([[1, 3, 0, 2]])
    order = torch.tensor([2, 0, 3, 1])
    assert plackett_luce(rewards, ranks).item() == pytest.approx(
        plackett_luce(rewards[:, order], ranks[:, order]).item()
    )


def test_plackett_luce_of_two_is_bradley_terry() -> None:
    rng = torch.Generator().manual_seed(2)
    rewards = (torch.randn(32, 2, generator=rng) * 8).requires_grad_()
    pairs = bradley_terry(rewards[:, 0], rewards[:, 1])
    lists = plackett_luce(rewards, torch.tensor([[0, 1]]).expand(32, 2))
    torch.testing.assert_close(lists, pairs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_of(lists, rewards), gradient_of(pairs, rewards), rtol=1e-5, atol=1e-6)


def test_plackett_luce_and_gradient_against_the_formula_in_float64() -> None:
    rng = torch.Generator().manual_seed(3)
    rewards = (torch.randn(16, 5, generator=rng) * 5).requires_grad_()
    ranks = torch.stack([torch.randperm(5, generator=rng) for _ in range(16)])
    loss = plackett_luce(rewards, ranks)
    exact = rewards.detach().double().requires_grad_()
    likelihood = torch.zeros(16, dtype=torch.float64)
    for row in range(16):
        best_first = ranks[row].argsort().tolist()
        for place, answer in enumerate(best_first):
            left = exact[row, best_first[place:]].exp().sum()
            likelihood[row] = likelihood[row] + (exact[row, answer].exp() / left).log()
    torch.testing.assert_close(loss.double(), -likelihood, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gradient_of(loss, rewards).double(), gradient_of(-likelihood, exact), rtol=1e-4, atol=1e-5
    )


def test_answers_of_equal_rank_are_not_compared() -> None:
    """The best one against both others; those two against nothing."""
    rewards = torch.tensor([[math.log(2), 0.0, math.log(5)]], requires_grad=True)
    loss = plackett_luce(rewards, torch.tensor([[0, 1, 1]]))
    assert loss.tolist() == pytest.approx([math.log(8 / 2)])
    assert gradient_of(loss, rewards)[0].tolist() == pytest.approx([2 / 8 - 1, 1 / 8, 5 / 8])


def test_centring_by_hand() -> None:
    pair = torch.tensor([[3.0, -1.0]], requires_grad=True)
    assert centring(pair).tolist() == [4.0]  # (3 − 1)²
    assert gradient_of(centring(pair), pair).tolist() == [[4.0, 4.0]]
    assert centring(torch.tensor([[3.0, -1.0, 1.0]])).tolist() == [4.0], "of more answers: twice their mean, squared"


def test_losses_far_out_are_finite() -> None:
    far = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    assert bradley_terry(far[:, 1], far[:, 0]).tolist() == [20000.0]
    loss = plackett_luce(far, torch.tensor([[2, 0, 1]]))
    assert loss.item() == pytest.approx(3e4)  # 2·10⁴ for the worst before all, 10⁴ for the middle one before the last
    assert torch.isfinite(gradient_of(loss, far)).all()
