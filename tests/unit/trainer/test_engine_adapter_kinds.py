"""The fast arithmetic of every kind of adapter against peft's, forward and backward."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from plumbline_api.training import Lora
from plumbline_trainer.engine import lowrank
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.pathcheck import choose_path
from plumbline_trainer.engine.scorer import Scorer, prepare_modes
from plumbline_trainer.models.adapters import attach_lora
from support.adapted import KINDS, attach_and_move, lora_of
from support.encoded import make_completion, make_pair
from support.tiny import STYLES, Style, make_model

GAP = 1e-5
ROWS = [make_pair(random.Random(number), 12, 6, 9) for number in range(3)] + [make_completion(random.Random(9), 7, 11)]


def measure(scorer: Scorer, path: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    scorer.path = path
    scores = scorer(pack(ROWS))
    factors = torch.randn(len(scores), generator=torch.Generator().manual_seed(0))
    trained = {name: parameter for name, parameter in scorer.model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad((factors * scores).sum(), list(trained.values()), allow_unused=True)
    return scores.detach(), {
        name: torch.zeros_like(trained[name]) if found is None else found
        for name, found in zip(trained, gradients, strict=True)
    }


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_fast_equals_plain(style: Style, kind: str) -> None:
    scorer = Scorer(attach_and_move(make_model(style, seed=1), lora_of(kind, style), 2, size=0.1))
    fast, fast_gradient = measure(scorer, "fast")
    plain, plain_gradient = measure(scorer, "plain")
    assert (fast - plain).norm() <= GAP * plain.norm()
    # By sort of parameter, so that large gradients do not hide wrong small ones.
    for part in ("lora_A", "lora_B", "lora_magnitude_vector", "norm", "ln_", "embed_tokens", "wte"):
        names = [name for name in plain_gradient if part in name]
        if names:
            one, other = (torch.cat([of[name].reshape(-1) for name in names]) for of in (fast_gradient, plain_gradient))
            assert other.norm() > 0
            assert (one - other).norm() <= 2 * GAP * other.norm(), part


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_fast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for function in (lowrank._LowRankLinear, lowrank._MagnitudeLinear):
        real = function.forward

        def counted(ctx: Any, *inputs: Any, _real: Any = real, _name: str = function.__name__) -> Any:
            calls.append(_name)
            return _real(ctx, *inputs)

        monkeypatch.setattr(function, "forward", staticmethod(counted))
    scorer = Scorer(attach_and_move(make_model("qwen2", seed=1), lora_of(kind), 2))
    trained = {name: parameter for name, parameter in scorer.model.named_parameters() if parameter.requires_grad}
    choice = choose_path(scorer, ROWS, trained, tokens=4096, ranks=Ranks())
    assert choice.path == "fast", choice.reason
    assert calls == ["_MagnitudeLinear" if lora_of(kind).dora else "_LowRankLinear"] * 14


def test_a_wrong_length_of_rows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lowrank.row_lengths
    monkeypatch.setattr(lowrank, "row_lengths", lambda *arguments: right(*arguments) * 1.01)
    scorer = Scorer(attach_and_move(make_model("llama", seed=1), lora_of("dora"), 2))
    trained = {name: parameter for name, parameter in scorer.model.named_parameters() if parameter.requires_grad}
    assert choose_path(scorer, ROWS, trained, tokens=4096, ranks=Ranks()).path == "plain"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_near_float32(style: Style, kind: str) -> None:
    """Both paths run on a frozen bfloat16 base; norms and embeddings may be float32 among its weights."""
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(style, seed=1).bfloat16().to(dtype)
        attach_and_move(model, lora_of(kind, style), 2)
        made.append(Scorer(model, precision=str(dtype).removeprefix("torch.")))
    exact, _ = measure(made[0], "plain")
    for path in ("fast", "plain"):
        found, gradients = measure(made[1], path)
        assert (found - exact).norm() <= 0.05 * exact.norm()
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())


def test_row_lengths_from_the_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((30, 50), (4, 50), (30, 4)))
    for size in (0.0, 0.01, 1.0):
        expected = (weight.double() + 1.5 * size * b.double() @ a.double()).norm(dim=1)
        found = lowrank.row_lengths(weight, a, size * b, 1.5)
        torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=0)


def test_magnitude_layer_by_hand() -> None:
    """W = [3 4], A = [1 0], B = [3], s = 1: W + BA = [6 4]; m = 2; x = [1 2] gives 2·14/√52, and +5 of bias."""
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    weight, bias = torch.tensor([[3.0, 4.0]]), torch.tensor([5.0])
    a, b = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)
    magnitude = torch.tensor([2.0], requires_grad=True)
    length = 52**0.5
    y = lowrank._MagnitudeLinear.apply(x, weight, bias, a, b, magnitude, torch.tensor([length]), 1.0)
    assert y.item() == pytest.approx(28 / length + 5)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == pytest.approx([12 / length, 8 / length])
    assert magnitude.grad is not None
    assert magnitude.grad.item() == pytest.approx(14 / length)
    assert a.grad is not None
    assert a.grad[0].tolist() == pytest.approx([2 / length * 3 * 1, 2 / length * 3 * 2])
    assert b.grad is not None
    assert b.grad.item() == pytest.approx(2 / length * 1)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_reaches_every_kind(dora: bool) -> None:
    model = attach_lora(make_model("llama", seed=1), Lora(rank=4, dropout=0.5, dora=dora), 1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1
    scorer = Scorer(model)
    prepare_modes(scorer, adapter_dropout=False, gradient_checkpointing=False)
    batch = pack(ROWS)
    with torch.no_grad():
        still = [scorer(batch) for _ in range(2)]
        prepare_modes(scorer, adapter_dropout=True, gradient_checkpointing=False)
        moving = [scorer(batch) for _ in range(2)]
    assert torch.equal(*still)
    assert not torch.equal(*moving)
