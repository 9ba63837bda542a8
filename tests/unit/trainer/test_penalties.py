"""L2-SP, EWC and layer-wise rates: by hand, against autograd, on ranks, and resumed."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.training import Lora, Schedule, Training
from plumbline_trainer.engine import fisher as fisher_module
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.fisher import fisher_diagonal
from plumbline_trainer.engine.layers import layer_depths
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.optimizer import Optimizer, named_trainables
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.penalties import Ewc, L2Sp, LowRank, Moved, displacements
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.adapters import attach_lora
from plumbline_trainer.stages import sft
from plumbline_trainer.storage.checkpoints import wait_for_uploads
from safetensors.torch import load_file
from support.encoded import make_completion
from support.ranks import run_ranks
from support.tiny import make_model
from support.trainer import manifest_of, output_folder, run_in_process, stage_context
from support.training_data import training_run
from torch import nn


def parameter(*rows: list[float]) -> nn.Parameter:
    found = nn.Parameter(torch.tensor(rows))
    found.grad = torch.zeros_like(found)
    return found


def gradient(weight: nn.Parameter) -> list[list[float]]:
    assert weight.grad is not None
    found: list[list[float]] = weight.grad.tolist()
    return found


def test_l2sp_by_hand() -> None:
    """Δ = (2, −1), λ = 0.5: ½ · 0.5 · 5 = 1.25 and a gradient of (1, −0.5), on top of what is there."""
    weight = parameter([3.0, 1.0])
    weight.grad = torch.tensor([[10.0, 10.0]])
    assert L2Sp(0.5, [Moved(weight, torch.tensor([[1.0, 2.0]]))]).add_gradients() == pytest.approx(1.25)
    assert gradient(weight) == [[11.0, 9.5]]


def test_l2sp_of_a_product_by_hand() -> None:
    """s = 2, B = (1, 3)ᵀ, A = (2, 1): Δ = 2·((2, 1), (6, 3)), ‖Δ‖² = 4·50 = 200, λ = 0.1: 10.

    ∂/∂B = λs²·B(AAᵀ) = 0.4·5·B = (2, 6)ᵀ; ∂/∂A = λs²·(BᵀB)A = 0.4·10·A = (8, 4).
    """
    a, b = parameter([2.0, 1.0]), parameter([1.0], [3.0])
    assert L2Sp(0.1, [LowRank(a, b, 2.0)]).add_gradients() == pytest.approx(10.0)
    assert gradient(b) == [[pytest.approx(2.0)], [pytest.approx(6.0)]]
    assert gradient(a) == [[pytest.approx(8.0), pytest.approx(4.0)]]


def test_ewc_by_hand() -> None:
    """Δ = (2, −1), F = (1, 10), λ = 0.5: ½ · 0.5 · (4 + 10) = 3.5 and a gradient of 0.5·(2, −10)."""
    weight = parameter([3.0, 1.0])
    changes = {"w": Moved(weight, torch.tensor([[1.0, 2.0]]))}
    assert Ewc(0.5, changes, {"w": torch.tensor([[1.0, 10.0]])}).add_gradients() == pytest.approx(3.5)
    assert gradient(weight) == [[1.0, -5.0]]


def test_ewc_of_a_product_by_hand() -> None:
    """s = 2, B = (1, 3)ᵀ, A = (2, 1): Δ = ((4, 2), (12, 6)); F = ((1, 0), (0, 2)), λ = 1: ½(16 + 72) = 44.

    G = F∘Δ = ((4, 0), (0, 12)); ∂/∂B = s·G·Aᵀ = (16, 24)ᵀ; ∂/∂A = s·Bᵀ·G = (8, 72).
    """
    a, b = parameter([2.0, 1.0]), parameter([1.0], [3.0])
    fisher = {"w": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}
    assert Ewc(1.0, {"w": LowRank(a, b, 2.0)}, fisher).add_gradients() == pytest.approx(44.0)
    assert gradient(b) == [[16.0], [24.0]]
    assert gradient(a) == [[8.0, 72.0]]


def test_ewc_of_a_product_beside_a_transposed_weight_by_hand() -> None:
    """The same numbers with F = ((1, 3), (0, 2)) where the weight lies as [out, in], here as [in, out].

    G = F∘Δ = ((4, 6), (0, 12)), ½(16 + 12 + 72) = 50; s·G·Aᵀ = (28, 24)ᵀ; s·Bᵀ·G = (8, 84).
    """
    fisher = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    for transposed in (False, True):
        a, b = parameter([2.0, 1.0]), parameter([1.0], [3.0])
        changes = {"w": LowRank(a, b, 2.0, transposed)}
        held = {"w": fisher.t().contiguous() if transposed else fisher}
        assert Ewc(1.0, changes, held).add_gradients() == pytest.approx(50.0)
        assert gradient(b) == [[28.0], [24.0]]
        assert gradient(a) == [[8.0, 84.0]]


@pytest.mark.parametrize("with_fisher", [False, True])
def test_gradients_against_autograd(with_fisher: bool) -> None:
    """On a model with an adapter of rank 3, the factors moved away from their start."""
    model = attach_lora(make_model(), Lora(rank=3, alpha=12.0), seed=1)
    trainables = named_trainables(model)
    changes = displacements(model, trainables)
    assert len(changes) * 2 == len(trainables)
    generator = torch.Generator().manual_seed(0)
    fisher = {}
    for name, change in changes.items():
        assert isinstance(change, LowRank)
        with torch.no_grad():
            change.b.copy_(torch.randn(change.b.shape, generator=generator))
        fisher[name] = torch.rand((change.b.shape[0], change.a.shape[1]), generator=generator)
    total = torch.zeros(())
    for name, change in changes.items():
        assert isinstance(change, LowRank)
        delta = 4.0 * (change.b @ change.a)
        total = total + 0.5 * 0.3 * ((fisher[name] if with_fisher else 1.0) * delta.square()).sum()
    expected = torch.autograd.grad(total, list(trainables.values()))
    for weight in trainables.values():
        weight.grad = torch.zeros_like(weight)
    penalty = Ewc(0.3, changes, fisher) if with_fisher else L2Sp(0.3, changes.values())
    assert penalty.add_gradients() == pytest.approx(float(total.detach()), rel=1e-5)
    for weight, other in zip(trainables.values(), expected, strict=True):
        assert weight.grad is not None
        assert torch.allclose(weight.grad, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["llama", "gpt2"])
@pytest.mark.parametrize("path", ["fast", "plain"])
def test_fisher_diagonal_against_one_row_at_a_time(style: Any, path: Any) -> None:
    """Squares of each row's gradient of the full weights, taken on the model without an adapter."""
    rng = random.Random(0)
    rows = [make_completion(rng, 5, length, share=0.7) for length in (3, 6, 4)]
    plain = Scorer(make_model(style), path="plain")
    for weight in plain.parameters():
        weight.requires_grad_(True)
    sums: dict[str, torch.Tensor] = {}
    tokens = 0
    for row in rows:
        plain.zero_grad()
        scores = plain(pack([row]))
        scores.sum().backward()
        tokens += len(scores)
        for name, weight in plain.model.named_parameters():
            assert weight.grad is not None
            sums[name] = sums.get(name, torch.zeros_like(weight)) + weight.grad.square()

    model = attach_lora(make_model(style), Lora(rank=2), seed=1)
    trainables = named_trainables(model)
    changes = displacements(model, trainables)
    found = fisher_diagonal(Scorer(model, path=path), changes, rows, Ranks())
    assert found.keys() == changes.keys()
    for name, values in found.items():
        assert torch.allclose(values, sums[name] / tokens, rtol=1e-3, atol=1e-7), name
    assert named_trainables(model).keys() == trainables.keys(), "frozen weights are frozen again"

    full = make_model(style)
    whole = fisher_diagonal(Scorer(full, path=path), displacements(full, dict(full.named_parameters())), rows, Ranks())
    for name, values in whole.items():
        assert torch.allclose(values, sums[name] / tokens, rtol=1e-3, atol=1e-7), name


def test_what_is_no_product_is_refused() -> None:
    import peft

    model = make_model()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    peft.inject_adapter_in_model(config, model)
    with pytest.raises(InputError, match="l2sp and ewc have no meaning there"):
        displacements(model, named_trainables(model))


@pytest.mark.parametrize(("style", "tie"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_depths(style: Any, tie: bool) -> None:
    depths = layer_depths(make_model(style, tie=tie, layers=3))
    stack, first, norm = (
        ("transformer.h", "wte", "transformer.ln_f")
        if style == "gpt2"
        else ("model.layers", "embed_tokens", "model.norm")
    )
    for name, depth in depths.items():
        if name.startswith(stack):
            assert depth == 2 - int(name.removeprefix(f"{stack}.").split(".")[0])
        elif first in name or "wpe" in name:
            assert depth == 3
        else:
            assert name.startswith((norm, "lm_head"))
            assert depth == 0
    assert ("lm_head.weight" in depths) is not tie


def test_each_layer_takes_its_share_of_the_rate() -> None:
    """Adam's first step moves a weight by its rate: 0.1, 0.05 and 0.025 with a factor of ½."""
    weights = {name: nn.Parameter(torch.ones(2, 2)) for name in ("bottom", "middle", "top")}
    training = Training(
        learning_rate=0.1, layer_decay=0.5, schedule=Schedule(type="linear", warmup_ratio=0.0), weight_decay=0.5
    )
    optimizer = Optimizer(weights, training, 4, {"bottom": 2, "middle": 1, "top": 0})
    for step in range(2):
        assert optimizer.learning_rate == pytest.approx(0.1 * (1 - step / 4))
        for weight in weights.values():
            weight.grad = torch.ones(2, 2)
        optimizer.step(Ranks())
        if step == 0:
            for weight, rate in zip(weights.values(), (0.025, 0.05, 0.1), strict=True):
                assert weight[0, 0].item() == pytest.approx(1 - rate * 0.5 - rate)
    rates = {id(group["params"][0]): group["lr"] for group in optimizer.adamw.param_groups}
    assert rates[id(weights["bottom"])] == pytest.approx(0.025 * 0.5)


SETTINGS: dict[str, Any] = {
    "rows": 15,
    "globalBatch": 5,
    "epochs": 3,
    "learningRate": 5e-3,
    "checkpointEverySteps": 2,
    "tokensPerBatch": 128,
}
HELD: dict[str, Any] = {
    "stage": {"ewc": {"dataset": "old", "coefficient": 30.0, "rows": 9}},
    "others": {"ewc.dataset": "text"},
    "layerDecay": 0.8,
    "l2sp": 0.05,
}


def weights_of(run: Any) -> dict[str, torch.Tensor]:
    return load_file(next(output_folder(run).glob("*.safetensors")))


def gap(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    total = sum(float(tensor.double().square().sum()) for tensor in weights.values())
    return math.sqrt(sum(float((weights[n] - others[n]).double().square().sum()) for n in weights) / total)


@pytest.mark.parametrize("lora", [{"rank": 4}, None])
def test_neither_ranks_nor_accumulation_change_penalties(tmp_path: Path, lora: Any) -> None:
    found = {}
    for name, processes, budget in (("one", 1, 4096), ("accumulated", 1, 64), ("two", 2, 128), ("four", 4, 128)):
        folder = tmp_path / name
        settings = {**SETTINGS, **HELD, "tokensPerBatch": budget, "processes": processes}
        run = training_run(folder, "sft", lora=lora, **settings)
        run_ranks(folder, run)
        found[name] = manifest_of(run).metrics, weights_of(run)
    metrics, weights = found["one"]
    assert metrics["ewc"] > 0
    assert metrics["l2sp"] > 0
    for name in ("accumulated", "two", "four"):
        for figure in ("loss", "ewc", "l2sp"):
            assert found[name][0][figure] == pytest.approx(metrics[figure], rel=1e-3)
        assert gap(weights, found[name][1]) < 1e-4


@pytest.mark.parametrize("type_", ["dpo", "kto", "orpo", "awr"])
def test_preference_stages_hold_weights_that_matter_elsewhere(tmp_path: Path, type_: str) -> None:
    figures = []
    for coefficient in (1e-6, 1e4):
        folder = tmp_path / f"{coefficient}"
        held = {"ewc": {"dataset": "old", "coefficient": coefficient, "rows": 9}}
        run = training_run(
            folder, type_, lora={"rank": 4}, stage=held, others={"ewc.dataset": "promptCompletion"}, **SETTINGS
        )
        result, code = run_in_process(folder, run)
        assert code == 0, result.message
        figures.append(manifest_of(run).metrics["ewc"] / coefficient)
    weak, strong = figures
    assert weak > 0
    assert strong < 0.5 * weak, "½ΣF·Δ², by which the answers of the other dataset would change"


def test_a_stronger_penalty_keeps_weights_nearer_to_their_start(tmp_path: Path) -> None:
    found = []
    for number, changes in enumerate(({}, {"l2sp": 10.0})):
        run = training_run(tmp_path / str(number), "sft", lora={"rank": 4}, **SETTINGS, **changes)
        assert run_in_process(tmp_path / str(number), run)[1] == 0
        weights = weights_of(run)
        names = [name for name in weights if "lora_A" in name]
        found.append(sum(float((weights[n.replace("_A", "_B")] @ weights[n]).square().sum()) for n in names))
    assert found[1] < 0.5 * found[0]


class Killed(BaseException):
    """The process ends here, as far as the stage is concerned."""


@pytest.mark.parametrize("lora", [{"rank": 4, "dropout": 0.1}, None])
def test_a_resumed_run_finds_the_fisher_diagonal_and_ends_with_the_same_bits(
    tmp_path: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, **HELD, "lora": lora}
    whole = training_run(tmp_path / "whole", "sft", **settings)
    assert run_in_process(tmp_path / "whole", whole)[1] == 0

    calls: list[int] = []
    real_fisher, real_step = fisher_module.fisher_diagonal, TrainingRun._take_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real_fisher(*args, **kwargs)

    monkeypatch.setattr(fisher_module, "fisher_diagonal", counted)
    folder = tmp_path / "killed"
    run = training_run(folder, "sft", **settings)
    context = stage_context(folder / "one", run)

    def dying(training: TrainingRun, objective: Any) -> None:
        if training.state.step == 5:
            wait_for_uploads(context)
            raise Killed
        real_step(training, objective)

    monkeypatch.setattr(TrainingRun, "_take_step", dying)
    with pytest.raises(Killed):
        sft.run(context)
    monkeypatch.setattr(TrainingRun, "_take_step", real_step)
    output = sft.run(stage_context(folder / "two", run))
    assert output is not None
    assert output.first_step == 4
    assert len(calls) == 1, "taken from storage"
    ours = load_file(next(output.folder.glob("*.safetensors")))
    assert all(torch.equal(tensor, ours[name]) for name, tensor in weights_of(whole).items())

    kept = next((Path(context.run_root.removeprefix("file://")) / "fisher").glob("*.safetensors"))
    before = kept.read_bytes()
    kept.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert sft.run(stage_context(folder / "three", run)) is not None
    assert len(calls) == 2, "damaged, so computed again"
    assert kept.read_bytes() == before
