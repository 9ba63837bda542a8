"""KL estimators and the controller of the KL coefficient, by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plumbline_trainer.losses.kl import KlController, KlEstimator, kl_estimate

LN2 = math.log(2)
POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("k1", [LN2, -LN2, 0.0]),
        ("k2", [LN2**2 / 2, LN2**2 / 2, 0.0]),
        ("k3", [0.5 - 1 + LN2, 2 - 1 - LN2, 0.0]),
    ],
)
def test_estimates_at_a_token(kind: KlEstimator, wanted: list[float]) -> None:
    """π = ½ where the reference has ¼, the other way round, and equal."""
    policy, reference = torch.tensor([0.5, 0.25, 0.3]).log(), torch.tensor([0.25, 0.5, 0.3]).log()
    found = kl_estimate(policy, reference, kind)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("kind", "wanted"), [("k1", 0.274887), ("k2", 0.293856), ("k3", 0.274887)])
def test_k1_and_k3_are_unbiased_and_k2_is_not(kind: KlEstimator, wanted: float) -> None:
    """Over three outcomes the expectation is exact: KL = ½·ln 2.5 + 0.2·ln 0.4 = 0.3·ln 2.5."""
    found = (POLICY * kl_estimate(POLICY.log(), REFERENCE.log(), kind)).sum()
    assert found.item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("kind", "right"), [("k1", "zero"), ("k2", "forward"), ("k3", "reversed")])
def test_as_a_loss_only_k2_has_the_gradient_of_the_divergence(kind: KlEstimator, right: str) -> None:
    """The expectation over the policy of ∇k, exactly: zero for k1, ∇KL(π ‖ ref) for k2, ∇KL(ref ‖ π) for k3."""
    logits = POLICY.log().requires_grad_(True)
    logs = torch.log_softmax(logits, dim=0)
    kl_estimate(logs, REFERENCE.log(), kind).mul(POLICY).sum().backward()
    other = POLICY.log().requires_grad_(True)
    policy = torch.log_softmax(other, dim=0)
    forward, backward = (policy.exp() * (policy - REFERENCE.log())).sum(), -(REFERENCE * policy).sum()
    wanted = {"zero": 0 * forward, "forward": forward, "reversed": backward}[right]
    (expected,) = torch.autograd.grad(wanted, other)
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert right == "zero" or expected.abs().max() > 0.1


def test_a_small_divergence_keeps_its_digits_in_float32() -> None:
    """k3 of 1e-4 is 5e-9; written as exp(−k1) − 1 + k1 in float32 it would be off by a multiple of itself."""
    small = torch.tensor([1e-4])
    assert kl_estimate(small, torch.zeros(1), "k3").item() == pytest.approx(5e-9, rel=1e-2)
    assert abs((torch.exp(-small) - 1 + small).item() - 5e-9) > 1e-8


def test_trap_17_a_temperature_on_one_side_only_shows_as_a_divergence() -> None:
    """Equal models at equal temperature have none, token by token, whichever estimator."""
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.4, 3.0]])
    alike, other = torch.log_softmax(logits / 0.7, dim=-1), torch.log_softmax(logits, dim=-1)
    for kind in ("k1", "k2", "k3"):
        assert kl_estimate(alike.flatten(), alike.flatten(), kind).tolist() == [0.0] * 6
    assert (alike.exp() * kl_estimate(alike, other, "k1")).sum(-1).min() > 0.02


def test_a_fixed_coefficient_stays() -> None:
    controller = KlController(0.05)
    controller.update(100.0, 512)
    assert controller.coefficient == 0.05


@pytest.mark.parametrize(
    ("kl", "wanted"),
    [
        (6.0, 0.1),
        (6.6, 0.1 * (1 + 0.1 * 64 / 10_000)),
        (12.0, 0.1 * (1 + 0.2 * 64 / 10_000)),  # +100 % counts as +20 %
        (0.0, 0.1 * (1 - 0.2 * 64 / 10_000)),
        (-3.0, 0.1 * (1 - 0.2 * 64 / 10_000)),  # k1 over few answers can be negative
    ],
)
def test_the_adaptive_coefficient(kl: float, wanted: float) -> None:
    controller = KlController(0.1, target=6.0, horizon=10_000)
    controller.update(kl, 64)
    assert controller.coefficient == pytest.approx(wanted, rel=1e-12)


@given(st.lists(st.floats(-50, 500), min_size=1, max_size=20), st.integers(1, 512))
def test_the_adaptive_coefficient_stays_positive_and_moves_the_right_way(
    divergences: list[float], answers: int
) -> None:
    controller = KlController(0.1, target=6.0, horizon=1000)
    for kl in divergences:
        before = controller.coefficient
        controller.update(kl, answers)
        assert controller.coefficient > 0
        assert (controller.coefficient - before) * (kl - 6.0) >= 0


def test_trap_27_the_controller_goes_on_from_its_state() -> None:
    whole, first = (KlController(0.1, target=6.0, horizon=1000) for _ in range(2))
    for kl in (3.0, 9.0, 7.0, 2.0):
        whole.update(kl, 32)
    for kl in (3.0, 9.0):
        first.update(kl, 32)
    second = KlController(0.1, target=6.0, horizon=1000)
    second.restore(json.loads(json.dumps(first.state())))
    for kl in (7.0, 2.0):
        second.update(kl, 32)
    assert second.coefficient == whole.coefficient != 0.1


@pytest.mark.parametrize("fields", [{"target": 0.0}, {"target": 6.0, "horizon": 0.0}])
def test_a_target_or_horizon_of_nothing_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        KlController(0.1, **fields)
