"""Log-probabilities through the head: value, gradient, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plumbline_trainer.engine import logprobs
from plumbline_trainer.engine.logprobs import (
    Head,
    log_probabilities,
    token_divergences,
    token_entropies,
    token_log_probabilities,
)
from torch.utils._python_dispatch import TorchDispatchMode

N, D, V = 53, 16, 300


def logs_by_definition(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits / head.temperature, -1)


def by_definition(hidden: torch.Tensor, targets: torch.Tensor, head: Head, smoothing: float = 0.0) -> torch.Tensor:
    labels = (1 - smoothing) * torch.nn.functional.one_hot(targets, V) + smoothing / V
    return (labels * logs_by_definition(hidden, head)).sum(-1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * V * 20)  # 20 tokens: two whole chunks and a rest


def make(bias: bool, scale: float, softcap: float | None, *, trained: bool) -> tuple[torch.Tensor, torch.Tensor, Head]:
    rng = torch.Generator().manual_seed(5)
    hidden = torch.randn(N, D, generator=rng).requires_grad_()
    weight = torch.randn(V, D, generator=rng).requires_grad_(trained)
    offset = torch.randn(V, generator=rng).requires_grad_(trained) if bias else None
    return hidden, torch.randint(V, (N,), generator=rng), Head(weight, offset, scale, softcap)


HEADS = [(False, 1.0, None), (True, 1.0, None), (True, 0.25, None), (True, 2.0, 5.0)]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("bias", "scale", "softcap"), HEADS)
def test_value_and_gradient(trained: bool, smoothing: float, bias: bool, scale: float, softcap: float | None) -> None:
    hidden, targets, head = make(bias, scale, softcap, trained=trained)
    inputs = [t for t in (hidden, head.weight, head.bias) if t is not None and t.requires_grad]
    factors = torch.randn(N, generator=torch.Generator().manual_seed(6))

    found = token_log_probabilities(hidden, targets, head, smoothing)
    gradients = torch.autograd.grad((factors * found).sum(), inputs)

    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, head.weight)]
    exact_bias = None if head.bias is None else head.bias.detach().double().requires_grad_(head.bias.requires_grad)
    expected = by_definition(exact[0], targets, Head(exact[1], exact_bias, scale, softcap), smoothing)
    wanted = torch.autograd.grad(
        (factors.double() * expected).sum(), [t for t in (*exact, exact_bias) if t is not None and t.requires_grad]
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-5)
    assert len(gradients) == len(wanted)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert (gradient.double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("bias", "scale", "softcap"), HEADS)
def test_temperature_divides_the_logits_last(trained: bool, bias: bool, scale: float, softcap: float | None) -> None:
    """Trap 17: policy, old policy and reference are taken at one temperature, after scale and cap."""
    hidden, targets, head = make(bias, scale, softcap, trained=trained)
    head = replace(head, temperature=0.7)
    inputs = [t for t in (hidden, head.weight, head.bias) if t is not None and t.requires_grad]
    found = token_log_probabilities(hidden, targets, head)
    wanted = by_definition(hidden, targets, head)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    factors = torch.randn(N, generator=torch.Generator().manual_seed(6))
    gradients = torch.autograd.grad((factors * found).sum(), inputs)
    for gradient, want in zip(gradients, torch.autograd.grad((factors * wanted).sum(), inputs), strict=True):
        assert (gradient - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("bias", "scale", "softcap"), HEADS)
def test_entropy_and_its_gradient(
    trained: bool, temperature: float, bias: bool, scale: float, softcap: float | None
) -> None:
    hidden, _, head = make(bias, scale, softcap, trained=trained)
    head = replace(head, temperature=temperature)
    inputs = [t for t in (hidden, head.weight, head.bias) if t is not None and t.requires_grad]
    found = token_entropies(hidden, head)
    logs = logs_by_definition(hidden, head)
    wanted = -(logs.exp() * logs).sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    factors = torch.randn(N, generator=torch.Generator().manual_seed(6))
    gradients = torch.autograd.grad((factors * found).sum(), inputs)
    for gradient, want in zip(gradients, torch.autograd.grad((factors * wanted).sum(), inputs), strict=True):
        assert (gradient - want).norm() <= 1e-4 * want.norm()


def test_entropy_by_hand() -> None:
    """p = (0.8, 0.2): −0.8·ln 0.8 − 0.2·ln 0.2 = 0.50040; at temperature 2 p = (2/3, 1/3): 0.63651."""
    weight = torch.tensor([[1.3862943611198906], [0.0]])
    assert token_entropies(torch.ones(1, 1), Head(weight)).item() == pytest.approx(0.5004024, abs=1e-6)
    found = token_entropies(torch.ones(1, 1), Head(weight, temperature=2.0))
    assert found.item() == pytest.approx(0.6365142, abs=1e-6)


def test_smoothing_by_hand() -> None:
    """Two tokens of p = (0.8, 0.2), label 0, ε = 0.1: 0.95·ln 0.8 + 0.05·ln 0.2."""
    weight = torch.tensor([[1.3862943611198906], [0.0]])
    found = token_log_probabilities(torch.ones(1, 1), torch.tensor([0]), Head(weight), 0.1)
    assert found.item() == pytest.approx(0.95 * -0.2231435513 + 0.05 * -1.6094379124, abs=1e-6)
    entropy = torch.nn.functional.cross_entropy(weight.t(), torch.tensor([0]), label_smoothing=0.1)
    assert found.item() == pytest.approx(-entropy.item(), abs=1e-6)


@pytest.mark.parametrize(("bias", "scale", "softcap"), HEADS)
def test_divergence_and_its_gradient(bias: bool, scale: float, softcap: float | None) -> None:
    hidden, _, head = make(bias, scale, softcap, trained=False)
    reference = hidden.detach() + 0.3 * torch.randn(N, D, generator=torch.Generator().manual_seed(7))
    factors = torch.randn(N, generator=torch.Generator().manual_seed(6))
    found = token_divergences(hidden, reference, head)
    (gradient,) = torch.autograd.grad((factors * found).sum(), [hidden])

    exact = hidden.detach().double().requires_grad_()
    double = Head(head.weight.double(), None if head.bias is None else head.bias.double(), scale, softcap)
    wanted = logs_by_definition(reference.double(), double)
    expected = (wanted.exp() * (wanted - logs_by_definition(exact, double))).sum(-1)
    (want,) = torch.autograd.grad((factors.double() * expected).sum(), [exact])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert (gradient.double() - want).norm() <= 1e-5 * want.norm()


def test_divergence_by_hand() -> None:
    """q = (½, ½), p = (0.8, 0.2): ½ ln(0.5/0.8) + ½ ln(0.5/0.2) = ½ ln 1.5625; none of a policy from itself."""
    weight = torch.tensor([[1.3862943611198906], [0.0]])
    found = token_divergences(torch.ones(2, 1), torch.tensor([[0.0], [1.0]]), Head(weight))
    assert found.tolist() == pytest.approx([0.2231435513, 0.0], abs=1e-6)


def test_same_values_with_and_without_gradient() -> None:
    hidden, targets, head = make(False, 1.0, None, trained=False)
    with torch.no_grad():
        scored = token_log_probabilities(hidden, targets, head)
    torch.testing.assert_close(scored, token_log_probabilities(hidden, targets, head), rtol=0, atol=2e-6)


def test_hopeless_tokens_stay_finite() -> None:
    """A probability far below the smallest float must not become −inf."""
    weight = torch.zeros(V, D)
    weight[0, 0], weight[1, 0] = 1.0, -1.0
    hidden = torch.zeros(1, D)
    hidden[0, 0] = 100.0
    hidden.requires_grad_()
    found = token_log_probabilities(hidden, torch.tensor([1]), Head(weight))
    assert found.item() == pytest.approx(-200.0)


class _Largest(TorchDispatchMode):
    """Records the largest floating-point result with the vocabulary as its last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[1] == V:
                self.rows = max(self.rows, tensor.shape[0])
        return result


@pytest.mark.parametrize("trained", [False, True])
def test_no_full_logits_forward_or_backward(trained: bool) -> None:
    hidden, targets, head = make(True, 1.0, 5.0, trained=trained)
    with _Largest() as largest:
        token_log_probabilities(hidden, targets, head).sum().backward()
    assert 0 < largest.rows <= 20


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, targets, head = make(False, 1.0, None, trained=False)
    token_log_probabilities(hidden, targets, head).sum().backward()
    assert head.weight.grad is None
    assert hidden.grad is not None


def test_no_tokens() -> None:
    _, _, head = make(False, 1.0, None, trained=False)
    hidden = torch.zeros(0, D, requires_grad=True)
    found = token_log_probabilities(hidden, torch.zeros(0, dtype=torch.long), head)
    found.sum().backward()
    assert found.shape == (0,)


def test_peaked_distributions_over_a_large_vocabulary_have_no_bias() -> None:
    """A running sum over the vocabulary drifts the same way for every token; preference losses would add that up."""
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(64, 50_000, generator=rng) * 2.0 - 8.0
    logits[:, 0] = 12.0
    # One-hot hidden states make the weight's columns the logits.
    head = Head(logits.t().contiguous())
    hidden = torch.eye(64).requires_grad_()
    targets = torch.zeros(64, dtype=torch.long)
    exact = torch.log_softmax(logits.double(), -1)[:, 0]
    trained = token_log_probabilities(hidden, targets, head)
    scored = token_log_probabilities(hidden.detach(), targets, head)
    assert torch.equal(trained, scored), "a reference is scored without a gradient, the policy with one"
    assert abs((trained.double() - exact).mean().item()) < 2e-6


def test_logarithms_over_a_large_vocabulary_do_not_drift() -> None:
    """A running sum over 49,152 powers is off by 1e-5 the same way for every token, which the mean shows."""
    rng = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(64, 49_152, generator=rng)).requires_grad_()
    exact = torch.log_softmax(logits.double(), -1)
    found = log_probabilities(logits)
    assert found.dtype == torch.float32
    assert float((found - exact).mean().abs()) < 5e-7
    factors = torch.randn(64, generator=rng)
    chosen = torch.arange(64)
    found_gradient, exact_gradient = (
        torch.autograd.grad((factors * logs[chosen, 7 * chosen]).sum(), logits)[0] for logs in (found, exact)
    )
    torch.testing.assert_close(found_gradient, exact_gradient, rtol=1e-5, atol=1e-9)
