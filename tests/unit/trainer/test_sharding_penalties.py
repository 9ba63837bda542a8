"""What holds a policy near its start or near another one, on sharded ranks: the numbers of one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.stagerun import StageRun
from plumbline_api.training import Lora
from plumbline_trainer.engine import fisher as fisher_module
from plumbline_trainer.engine import loop, reference_pass
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.fisher import fisher_diagonal
from plumbline_trainer.engine.optimizer import named_trainables
from plumbline_trainer.engine.pathcheck import PathChoice
from plumbline_trainer.engine.penalties import Ewc, displacements
from plumbline_trainer.engine.recomputation import estimated
from plumbline_trainer.engine.scorer import Path as PathName
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.sharding import gathered, is_sharded, own_part, shard, sharded_like, whole
from plumbline_trainer.models.adapters import attach_lora
from support.encoded import make_completion
from support.outcomes import SETTINGS, assert_same, outcome_of
from support.ranks import in_ranks
from support.tiny import make_model, save_model
from support.trainer import base_model, manifest_of
from support.training_data import training_run
from torch import Tensor

pytestmark = pytest.mark.slow

LORA = {"rank": 4}
HELD: dict[str, Any] = {
    "stage": {"ewc": {"dataset": "old", "coefficient": 300.0, "rows": 5}},
    "others": {"ewc.dataset": "text"},
}
NEAR: dict[str, Any] = {"stage": {"kl": {"coefficient": 0.5, "baseModel": True}}}


def penalty_of(ranks: Ranks, style: Any, lora: bool, path: PathName) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """F of five rows, and the value and gradients of its penalty once the weights have moved, all whole."""
    rng = random.Random(0)
    rows = [make_completion(rng, 5, length, share=0.7) for length in (3, 6, 4, 5, 2)]
    model: Any = make_model(style)
    if lora:
        model = attach_lora(model, Lora(rank=2), seed=1)
    else:
        model.requires_grad_(True)
    scorer = Scorer(model, path=path)
    shard(scorer, ranks)
    trained = named_trainables(model)
    changes = displacements(model, trained)
    fisher = fisher_diagonal(scorer, changes, rows, ranks)
    assert named_trainables(model).keys() == trained.keys(), "frozen weights are frozen again"
    assert all(parameter.grad is None for parameter in scorer.parameters())
    assert all(is_sharded(values) == (ranks.size > 1) for values in fisher.values())
    for index, parameter in enumerate(trained.values()):
        generator = torch.Generator().manual_seed(index)
        moved = 0.02 * torch.randn(parameter.shape, generator=generator)
        start = ranks.rank * -(-len(moved) // ranks.size)
        with torch.no_grad():
            own = own_part(parameter)
            own += moved[start : start + len(own)] if is_sharded(parameter) else moved
        parameter.grad = sharded_like(torch.zeros_like(own_part(parameter)), parameter)
    value = Ewc(0.3, changes, fisher, ranks).add_gradients()
    gradients = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    found = gathered(gradients, keeps=True) | {"value": torch.tensor(value)}
    # A model that took part in this trains as before.
    scorer.zero_grad()
    torch.autograd.backward(scorer(fisher_module.pack(rows[:2])).sum() / ranks.size)
    after = {f"after {name}": whole(p.grad) for name, p in trained.items() if is_sharded(p) and p.grad is not None}
    ranks.sum_tensors([p.grad for p in trained.values() if not is_sharded(p) and p.grad is not None])
    plain = {f"after {name}": p.grad for name, p in trained.items() if not is_sharded(p) and p.grad is not None}
    return gathered(fisher, keeps=True), found | after | plain


@pytest.mark.parametrize(
    ("style", "lora", "path", "size"),
    [
        ("llama", True, "fast", 2),
        ("llama", False, "plain", 2),
        ("gpt2", True, "plain", 4),
        ("gpt2", True, "fast", 2),
        ("gpt2", False, "fast", 3),
    ],
)
def test_every_rank_takes_its_rows_of_the_fisher_diagonal_and_of_the_penalty(
    style: Any, lora: bool, path: PathName, size: int
) -> None:
    """Five rows leave ranks idle in the last round; GPT-2's weights lie transposed."""
    expected = penalty_of(Ranks(), style, lora, path)

    def work(ranks: Ranks) -> Any:
        return [
            {name: tensor.tolist() for name, tensor in part.items()} for part in penalty_of(ranks, style, lora, path)
        ]

    for found in in_ranks(size, work):
        for part, other in zip(expected, found, strict=True):
            assert part.keys() == other.keys()
            for name, tensor in part.items():
                largest = float(tensor.abs().max())
                assert torch.allclose(torch.tensor(other[name]), tensor, rtol=1e-4, atol=1e-5 * largest), name


def run_of(folder: Path, type_: str, lora: Any, **changes: Any) -> StageRun:
    run = training_run(folder, type_, lora=lora, **{**SETTINGS, "sharding": "full", **changes})
    if "kl" in run.parameters:
        reference = folder / "reference"
        if not reference.exists():
            save_model(reference, changes.get("style", "llama"), seed=7)
        run = run.model_copy(update={"inputs": [*run.inputs, base_model(f"file://{reference}", "kl.reference")]})
    return run


def assert_ranks_agree(folder: Path, make: Callable[[Path, int], StageRun], sizes: tuple[int, ...]) -> dict[str, float]:
    """The same outcome on one rank and on each other number; the figures of one at its end."""
    first = make(folder / "1", 1)
    one = outcome_of(folder / "1", first)
    for size in sizes:
        run = make(folder / str(size), size)
        assert_same(one, outcome_of(folder / str(size), run), "kl")
        assert manifest_of(run).metrics["plainPath"] == manifest_of(first).metrics["plainPath"]
    return dict(manifest_of(first).metrics)


@pytest.mark.parametrize(
    ("lora", "changes", "sizes"),
    [
        (LORA, {}, (2, 4)),
        (None, {}, (2, 4)),
        (LORA, {"style": "gpt2"}, (3,)),
        (LORA | {"modulesToSave": ["norm"]}, {"l2sp": 0.1}, (2,)),
    ],
    ids=["lora", "full", "gpt2", "beside"],
)
def test_ewc_holds_weights_as_on_one_rank(
    tmp_path: Path, lora: Any, changes: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    figures = assert_ranks_agree(
        tmp_path, lambda folder, size: run_of(folder, "sft", lora, processes=size, **HELD, **changes), sizes
    )
    assert figures["plainPath"] == 0
    assert figures["ewc"] > 1e-3 * figures["loss"]


@pytest.mark.parametrize(
    ("type_", "lora", "changes", "sizes"),
    [
        ("sft", LORA, {}, (2, 4)),
        ("sft", None, {}, (2, 4)),
        ("sft", None, {"gradientCheckpointing": True, "style": "gemma2"}, (3,)),
        ("orpo", LORA, {"style": "gpt2"}, (2,)),
    ],
    ids=["lora", "full", "checkpointing", "orpo"],
)
def test_another_policy_is_a_reference_as_on_one_rank(
    tmp_path: Path, type_: str, lora: Any, changes: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    figures = assert_ranks_agree(
        tmp_path, lambda folder, size: run_of(folder, type_, lora, processes=size, **NEAR, **changes), sizes
    )
    assert figures["plainPath"] == 0
    assert figures["kl"] > 0.1


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("held", [HELD, NEAR], ids=["ewc", "kl"])
def test_the_plain_path_holds_too(tmp_path: Path, lora: Any, held: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two answers a row, ranks run the models an unequal number of times."""
    for module in (loop, reference_pass):
        monkeypatch.setattr(module, "choose_path", lambda *_args, **_more: PathChoice("plain", "asked for"))
    type_ = "orpo" if held is NEAR else "sft"

    def make(folder: Path, size: int) -> StageRun:
        return run_of(folder, type_, lora, processes=size, **held)

    assert assert_ranks_agree(tmp_path, make, (3,))["plainPath"] == 1


def test_a_rank_keeps_its_part_of_a_reference_and_of_the_fisher_diagonal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the reference its head whole beside that, which here is the embeddings."""
    real = loop.TrainingRun.train

    def measured(run: Any, *args: Any, **more: Any) -> None:
        reference = more["kl_reference"].model
        penalty = next(item for item in run.penalties if isinstance(item, Ewc))
        kept = {
            "reference": sum(own_part(p).numel() for n, p in reference.named_parameters() if "embed" not in n),
            "of": sum(p.numel() for n, p in reference.named_parameters() if "embed" not in n),
            "head": own_part(reference.get_output_embeddings().weight).numel(),
            "fisher": sum(own_part(values).numel() for _, values in penalty.pairs),
            "estimate": estimated(run.scorer, 1, ["ewc"], []) - estimated(run.scorer, 1, [], []),
        }
        (tmp_path / f"kept-{run.ranks.rank}.json").write_text(json.dumps(kept))
        real(run, *args, **more)

    monkeypatch.setattr(loop.TrainingRun, "train", measured)
    stage = HELD["stage"] | NEAR["stage"]
    run = run_of(tmp_path, "sft", None, processes=2, stage=stage, others=HELD["others"])
    outcome_of(tmp_path, run)
    parts = [json.loads((tmp_path / f"kept-{rank}.json").read_text()) for rank in range(2)]
    model = make_model()
    for part in parts:
        assert part["reference"] == part["of"] / 2
        assert part["head"] == model.lm_head.weight.numel()
        assert part["fisher"] == sum(p.numel() for p in model.parameters()) / 2
        # F, and where the weights started.
        assert part["estimate"] == 2 * 4 * part["fisher"]


@pytest.mark.parametrize("lora", [LORA | {"modulesToSave": ["norm"]}, None], ids=["lora", "full"])
def test_bfloat16_is_held_within_its_rounding(tmp_path: Path, lora: Any) -> None:
    """With an adapter the gradients that are squared are bfloat16 themselves."""
    held = {"stage": HELD["stage"] | NEAR["stage"], "others": HELD["others"]}
    changes: dict[str, Any] = {**held, "precision": "bfloat16", "dtype": "bfloat16"}
    one, two = (
        outcome_of(tmp_path / str(size), run_of(tmp_path / str(size), "sft", lora, processes=size, **changes))
        for size in (1, 2)
    )
    for first, second in zip(one.curve, two.curve, strict=True):
        assert first.keys() == second.keys()
        for name, tolerance in (("loss", 2e-3), ("kl", 1e-2), ("ewc", 0.05)):
            if name in first:
                assert second[name] == pytest.approx(first[name], rel=tolerance), name


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_second_attempt_finds_the_fisher_diagonal_whole(
    tmp_path: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, "sft", lora, processes=2, **HELD)
    first = outcome_of(tmp_path / "one", run)

    def fail(*_args: Any, **_more: Any) -> Any:
        raise AssertionError("it is there")

    monkeypatch.setattr(fisher_module, "fisher_diagonal", fail)
    second = outcome_of(tmp_path / "two", run)
    assert all(torch.equal(second.weights[name], tensor) for name, tensor in first.weights.items())
