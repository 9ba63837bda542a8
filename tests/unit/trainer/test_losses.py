"""Losses against numbers worked by hand and against their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from plumbline_trainer.losses.likelihood import negative_log_likelihood
from plumbline_trainer.losses.preference import log_ratio, sigmoid_loss


def test_negative_log_likelihood_by_hand() -> None:
    log_probabilities = torch.tensor([math.log(0.5), math.log(0.25), math.log(0.125)], requires_grad=True)
    loss = negative_log_likelihood(log_probabilities, torch.tensor([1.0, 2.0, 0.0]))
    assert loss.item() == pytest.approx(5 * math.log(2))  # ln 2 + 2 · 2 ln 2
    loss.backward()
    assert log_probabilities.grad is not None
    assert log_probabilities.grad.tolist() == [-1.0, -2.0, 0.0]


def test_sigmoid_loss_by_hand() -> None:
    # r_w = −1 − (−2) = 1, r_l = −3 − (−1) = −2, β·Δ = 0.5 · 3 = 1.5
    chosen = log_ratio(torch.tensor([-1.0]), torch.tensor([-2.0]))
    rejected = log_ratio(torch.tensor([-3.0]), torch.tensor([-1.0]))
    assert sigmoid_loss(chosen, rejected, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_sigmoid_loss_is_ln_2_where_policy_and_reference_agree() -> None:
    zero = torch.zeros(3)
    assert sigmoid_loss(zero, zero, beta=0.1).tolist() == pytest.approx([math.log(2)] * 3)


def test_sigmoid_loss_and_gradient_against_the_formula_in_float64() -> None:
    rng = torch.Generator().manual_seed(1)
    chosen = (torch.randn(64, generator=rng) * 30).requires_grad_()
    rejected = (torch.randn(64, generator=rng) * 30).requires_grad_()
    loss = sigmoid_loss(chosen, rejected, beta=0.3)
    loss.sum().backward()
    margin = 0.3 * (chosen.detach().double() - rejected.detach().double())
    torch.testing.assert_close(loss.double(), torch.log1p(torch.exp(-margin)), rtol=1e-5, atol=1e-6)
    slope = -0.3 / (1 + torch.exp(margin))
    assert chosen.grad is not None
    assert rejected.grad is not None
    torch.testing.assert_close(chosen.grad.double(), slope, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(rejected.grad.double(), -slope, rtol=1e-5, atol=1e-7)


def test_sigmoid_loss_far_out_is_finite() -> None:
    loss = sigmoid_loss(torch.tensor([-1e4, 1e4]), torch.tensor([1e4, -1e4]), beta=1.0)
    assert loss.tolist() == [20000.0, 0.0]
