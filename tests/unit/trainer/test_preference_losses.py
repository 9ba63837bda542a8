"""Preference losses: numbers worked by hand, the papers' formulas in float64, and what holds for every input."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plumbline_trainer.losses import preference as losses
from torch import Tensor

LN2 = math.log(2)
BETA = 0.5


def sigma(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


# The papers' formulas, written out as they stand there, for float64.
FORMULAS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "sigmoid": (
        partial(losses.sigmoid_loss, beta=BETA),
        lambda w, r: -torch.log(sigma(BETA * (w - r))),
    ),
    "conservative": (
        partial(losses.sigmoid_loss, beta=BETA, label_smoothing=0.2),
        lambda w, r: -0.8 * torch.log(sigma(BETA * (w - r))) - 0.2 * torch.log(sigma(BETA * (r - w))),
    ),
    "robust": (
        partial(losses.robust_loss, beta=BETA, label_smoothing=0.2),
        lambda w, r: (-0.8 * torch.log(sigma(BETA * (w - r))) + 0.2 * torch.log(sigma(BETA * (r - w)))) / 0.6,
    ),
    "ipo": (partial(losses.ipo_loss, beta=BETA), lambda w, r: (w - r - 1 / (2 * BETA)) ** 2),
    "hinge": (
        partial(losses.hinge_loss, beta=BETA),
        lambda w, r: torch.maximum(torch.zeros_like(w), 1 - BETA * (w - r)),
    ),
    "exo": (
        partial(losses.exo_loss, beta=BETA, label_smoothing=0.01),
        lambda w, r: (
            torch.softmax(BETA * torch.stack([w, r]), 0)
            * (
                torch.log(torch.softmax(BETA * torch.stack([w, r]), 0))
                - torch.log(torch.tensor([[0.99], [0.01]], dtype=torch.float64))
            )
        ).sum(0),
    ),
    "nca": (
        partial(losses.nca_loss, beta=BETA),
        lambda w, r: (
            -torch.log(sigma(BETA * w)) - 0.5 * torch.log(sigma(-BETA * w)) - 0.5 * torch.log(sigma(-BETA * r))
        ),
    ),
    "apo zero": (partial(losses.apo_zero_loss, beta=BETA), lambda w, r: 1 - sigma(BETA * w) + sigma(BETA * r)),
    "apo down": (partial(losses.apo_down_loss, beta=BETA), lambda w, r: sigma(BETA * w) + 1 - sigma(BETA * (w - r))),
    "simpo": (
        partial(losses.simpo_loss, beta=2.0, gamma=1.0),
        lambda w, r: -torch.log(sigma(2 * w - 2 * r - 1)),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
@settings(deadline=None)
@given(data=st.lists(st.tuples(st.floats(-25, 25), st.floats(-25, 25)), min_size=1, max_size=12))
def test_value_and_gradient_against_the_formula_in_float64(name: str, data: list[tuple[float, float]]) -> None:
    loss, formula = FORMULAS[name]
    chosen, rejected = (torch.tensor(column, dtype=torch.float32) for column in zip(*data, strict=True))
    if name == "hinge":  # it has no gradient at its kink
        assume(bool(((1 - BETA * (chosen.double() - rejected.double())).abs() > 1e-4).all()))
    exact = [tensor.double().requires_grad_() for tensor in (chosen, rejected)]
    wanted = formula(*exact)
    wanted.sum().backward()
    ours = [tensor.clone().requires_grad_() for tensor in (chosen, rejected)]
    found = loss(*ours)
    assert found.shape == chosen.shape
    found.sum().backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, exact, strict=True):
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in (one, other)]
        torch.testing.assert_close(grads[0].double(), grads[1], rtol=2e-5, atol=2e-6)


# r_w = 1, r_l = −2, so Δ = 3 and β·Δ = 1.5 with β = ½.
BY_HAND: dict[str, tuple[Callable[..., Tensor], float]] = {
    "sigmoid": (partial(losses.sigmoid_loss, beta=BETA), math.log(1 + math.exp(-1.5))),
    # 0.9 · ln(1 + e^−1.5) + 0.1 · ln(1 + e^1.5) = ln(1 + e^−1.5) + 0.1 · 1.5
    "conservative": (
        partial(losses.sigmoid_loss, beta=BETA, label_smoothing=0.1),
        math.log(1 + math.exp(-1.5)) + 0.15,
    ),
    # (0.9 · a − 0.1 · (a + 1.5)) / 0.8 = a − 0.1875 with a = ln(1 + e^−1.5)
    "robust": (partial(losses.robust_loss, beta=BETA, label_smoothing=0.1), math.log(1 + math.exp(-1.5)) - 0.1875),
    "ipo": (partial(losses.ipo_loss, beta=BETA), (3 - 1) ** 2),
    "hinge, won": (partial(losses.hinge_loss, beta=BETA), 0.0),
    "hinge, not yet": (partial(losses.hinge_loss, beta=0.1), 0.7),
    # β·Δ = ln 3 makes q = ¾: ¾ · ln(¾ / ½) + ¼ · ln(¼ / ½)
    "exo": (
        partial(losses.exo_loss, beta=math.log(3) / 3, label_smoothing=0.5 - 1e-9),
        0.75 * math.log(1.5) - 0.25 * LN2,
    ),
    # β = ln 2: σ(ln 2) = 2/3 and σ(2·ln 2) = 4/5
    "nca": (partial(losses.nca_loss, beta=LN2), math.log(1.5) + 0.5 * math.log(3) + 0.5 * math.log(1.25)),
    "apo zero": (partial(losses.apo_zero_loss, beta=LN2), 1 - 2 / 3 + 1 / 5),
    "apo down": (partial(losses.apo_down_loss, beta=LN2), 2 / 3 + 1 - 8 / 9),
    # 2 · (1 − (−2)) − 1 = 5
    "simpo": (partial(losses.simpo_loss, beta=2.0, gamma=1.0), math.log(1 + math.exp(-5))),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    loss, expected = BY_HAND[name]
    assert loss(torch.tensor([1.0]), torch.tensor([-2.0])).tolist() == pytest.approx([expected], rel=1e-5)


def test_odds_ratio_by_hand() -> None:
    # P_w = ½ has odds 1, P_l = ¼ has odds ⅓: −log σ(ln 3) = ln 4/3
    chosen, rejected = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert losses.odds_ratio_loss(chosen, rejected).item() == pytest.approx(math.log(4 / 3))
    assert losses.log_odds(rejected).item() == pytest.approx(-math.log(3))


@settings(deadline=None)
@given(
    chosen=st.floats(-60, -1e-6, exclude_max=True),
    rejected=st.floats(-60, -1e-6, exclude_max=True),
)
def test_odds_ratio_against_the_formula_in_float64(chosen: float, rejected: float) -> None:
    ours = [torch.tensor([value], dtype=torch.float32).requires_grad_() for value in (chosen, rejected)]
    found = losses.odds_ratio_loss(*ours)
    found.backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    odds = [p - torch.log(-torch.expm1(p)) for p in exact]
    wanted = torch.log1p(torch.exp(-(odds[0] - odds[1])))
    wanted.backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, exact, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        # Near 0 the slope of the odds is 1/|p|, and so is its rounding.
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_odds_stay_finite_where_rounding_has_reached_certainty() -> None:
    chosen = torch.tensor([0.0, -1e-45, -200.0]).requires_grad_()
    loss = losses.odds_ratio_loss(chosen, torch.tensor([-1.0, -1.0, -1.0]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert chosen.grad is not None
    assert torch.isfinite(chosen.grad).all()


def test_ranking_loss_by_hand() -> None:
    # Best to worst −2, −1, −3: only the second one is above a better one, by 1.
    values = torch.tensor([-2.0, -1.0, -3.0]).requires_grad_()
    loss = losses.ranking_loss(values, torch.tensor([0, 1, 2]))
    assert loss.item() == 1.0
    loss.backward()
    assert values.grad is not None
    assert values.grad.tolist() == [-1.0, 1.0, 0.0]
    # −3 best, −2 and −1 tied: 1 + 2, nothing between the tied ones.
    assert losses.ranking_loss(torch.tensor([-3.0, -2.0, -1.0]), torch.tensor([0, 1, 1])).item() == 3.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 0), st.integers(0, 4)), min_size=2, max_size=7))
def test_ranking_loss_against_the_formula_in_float64(data: list[tuple[float, int]]) -> None:
    values, ranks = zip(*data, strict=True)
    expected = sum(
        max(0.0, values[i] - values[j])
        for i in range(len(data))
        for j in range(len(data))
        if ranks[i] > ranks[j]  # i is worse
    )
    found = losses.ranking_loss(torch.tensor(values), torch.tensor(ranks)).item()
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@settings(deadline=None)
@given(chosen=st.floats(-50, 50), rejected=st.floats(-50, 50), beta=st.floats(0.01, 3))
def test_label_smoothing_0_is_the_plain_loss(chosen: float, rejected: float, beta: float) -> None:
    pair = torch.tensor([chosen]), torch.tensor([rejected])
    plain = losses.sigmoid_loss(*pair, beta=beta)
    assert torch.equal(losses.sigmoid_loss(*pair, beta=beta, label_smoothing=0.0), plain)
    torch.testing.assert_close(losses.robust_loss(*pair, beta=beta, label_smoothing=0.0), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (partial(losses.sigmoid_loss, beta=0.1), LN2),
        (partial(losses.sigmoid_loss, beta=0.1, label_smoothing=0.3), LN2),
        (partial(losses.robust_loss, beta=0.1, label_smoothing=0.3), LN2),
        (partial(losses.ipo_loss, beta=0.1), 25.0),
        (partial(losses.hinge_loss, beta=0.1), 1.0),
        (partial(losses.exo_loss, beta=0.1, label_smoothing=1e-3), -LN2 - 0.5 * math.log(0.999 * 0.001)),
        (partial(losses.nca_loss, beta=0.1), 2 * LN2),
        (partial(losses.apo_zero_loss, beta=0.1), 1.0),
        (partial(losses.apo_down_loss, beta=0.1), 1.0),
    ],
)
def test_where_policy_and_reference_agree(loss: Callable[..., Tensor], expected: float) -> None:
    zero = torch.zeros(2)
    assert loss(zero, zero).tolist() == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "ipo"])
def test_far_out_values_and_gradients_are_finite(name: str) -> None:
    loss = FORMULAS[name][0]
    chosen = torch.tensor([-1e4, 1e4]).requires_grad_()
    rejected = torch.tensor([1e4, -1e4]).requires_grad_()
    found = loss(chosen, rejected)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert chosen.grad is not None
    assert torch.isfinite(chosen.grad).all()
