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
    for function in (lowrank._LowRankLinear, lowrank._MagnitudeLinear, lowrank._GatedLinear):
        real = function.forward

        def counted(ctx: Any, *inputs: Any, _real: Any = real, _name: str = function.__name__) -> Any:
            calls.append(_name)
            return _real(ctx, *inputs)

        monkeypatch.setattr(function, "forward", staticmethod(counted))
    scorer = Scorer(attach_and_move(make_model("qwen2", seed=1), lora_of(kind), 2))
    trained = {name: parameter for name, parameter in scorer.model.named_parameters() if parameter.requires_grad}
    choice = choose_path(scorer, ROWS, trained, tokens=4096, ranks=Ranks())
    assert choice.path == "fast", choice.reason
    # Seven layers in each of two blocks; the last of a block takes gate and up instead of their product.
    block = ["_LowRankLinear"] * 6 + ["_GatedLinear"]
    assert calls == (["_MagnitudeLinear"] * 14 if lora_of(kind).dora else block * 2)


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


@pytest.mark.parametrize("style", ["llama", "qwen2"])
def test_bfloat16_goes_in_one_piece(style: Style, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast peft widens each layer's input; one piece narrows the factors instead, and is no less exact."""
    calls: list[tuple[torch.dtype, ...]] = []
    real = lowrank._LowRankLinear.forward

    def noted(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, a: torch.Tensor, *others: Any) -> Any:
        calls.append((x.dtype, weight.dtype, a.dtype))
        return real(ctx, x, weight, bias, a, *others)

    monkeypatch.setattr(lowrank._LowRankLinear, "forward", staticmethod(noted))
    made = []
    for precision in ("float32", "bfloat16"):
        model = make_model(style, seed=1).bfloat16().to(getattr(torch, precision))
        made.append(Scorer(attach_lora(model, Lora(rank=4), seed=1), precision=precision))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    exact, wanted = measure(made[0], "plain")
    _, peft = measure(made[1], "plain")
    calls.clear()
    found, gradients = measure(made[1], "fast")
    assert set(calls) == {(torch.bfloat16,) * 3}, "factors are narrowed once for all layers"
    assert len(calls) == 12
    assert (found - exact).norm() <= 0.02 * exact.norm()
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}

    def gap(of: dict[str, torch.Tensor]) -> float:
        return float(torch.cat([(of[name] - wanted[name]).flatten() for name in wanted]).norm())

    assert gap(gradients) <= 1.25 * gap(peft)


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


def test_gated_layer_by_hand() -> None:
    """h = 2·5 = 10 with act(g) = g²/2 at g = 2; W = [3], A = [1], B = [4], s = ½: y = (3 + 2)·10 + 1."""
    gate, up = torch.tensor([[2.0]], requires_grad=True), torch.tensor([[5.0]], requires_grad=True)
    weight, bias = torch.tensor([[3.0]]), torch.tensor([1.0])
    a, b = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[4.0]], requires_grad=True)
    y = lowrank._GatedLinear.apply(gate, up, lambda g: g * g / 2, weight, bias, a, b, 0.5)
    assert y.item() == pytest.approx(51)
    y.sum().backward()
    found = [tensor.grad.item() if tensor.grad is not None else None for tensor in (gate, up, a, b)]
    # ∂h = 5: act′(2)·up·5 = 50 and act(2)·5 = 10; s·B·h = 20; s·A·h = 5.
    assert found == pytest.approx([50, 10, 20, 5])


@pytest.mark.parametrize("kind", ["lora", "frozen"])
def test_a_gated_block_keeps_two_of_four_tensors(kind: str) -> None:
    model = make_model("llama", seed=1)
    block = model.model.layers[0].mlp
    if kind == "lora":
        attach_lora(model, Lora(rank=4), 1)
    model.requires_grad_(False)
    x = torch.randn(5, 64, requires_grad=True)

    def kept() -> list[int]:
        found: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.shape[0] == 5:
                found[tensor.data_ptr()] = tensor.shape[1]
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(x)
        return sorted(found.values())

    inner = block.gate_proj.out_features
    separate = kept()
    with lowrank.in_one_piece(model):
        together = kept()
    assert together.count(inner) == 2 < separate.count(inner)


class _Other(torch.nn.Module):
    """A block that is like a gated one but for its last line."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(4, 4) for _ in range(3))
        self.act_fn = torch.nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2


def test_only_what_is_known_to_be_a_gated_block_is_taken() -> None:
    kinds = {
        style: {type(m).__name__ for m in make_model(style).modules() if lowrank.is_gated(type(m).forward)}
        for style in STYLES
    }
    assert kinds == {"llama": {"LlamaMLP"}, "qwen2": {"Qwen2MLP"}, "gemma2": {"Gemma2MLP"}, "gpt2": set()}
    assert not lowrank.is_gated(_Other.forward)
    assert not lowrank.is_gated(torch.nn.SiLU.forward)


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
