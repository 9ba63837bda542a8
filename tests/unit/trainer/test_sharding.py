"""Replicated or sharded, on 1, 2 and 4 ranks, cut into any micro-batches: the same numbers."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.errors import InputError
from plumbline_api.methods import TRAINING_STAGES
from plumbline_api.online import Grpo
from plumbline_api.stagerun import StageRun
from plumbline_api.training import Schedule, Training
from plumbline_trainer.engine import loop
from plumbline_trainer.engine.attention import FastPathError
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.optimizer import Optimizer
from plumbline_trainer.engine.pathcheck import PathChoice
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.sharding import _layers, gathered, is_sharded, own_part, put, sharded_like, whole
from plumbline_trainer.storage.checkpoints import wait_for_uploads
from pydantic import ValidationError
from support.outcomes import SETTINGS, Outcome, assert_same, outcome_of
from support.ranks import in_ranks, run_killed_ranks, run_ranks
from support.tiny import make_model
from support.trainer import manifest_of, output_of
from support.training_data import training_run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytestmark = pytest.mark.slow

LORA = {"rank": 4}
EVERYTHING = {"rank": 4, "rsLora": True, "dora": True, "modulesToSave": ["embed_tokens", "lm_head", "norm"]}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", {}),
    "sft": ("sft", {}),
    "rewardModel": ("rewardModel", {"heads": 2}),
    "dpo": ("dpo", {}),
    "ipo": ("dpo", {"loss": "ipo"}),
    "kto": ("kto", {}),
    "orpo": ("orpo", {}),
    "simpo": ("simpo", {}),
    "cpo": ("cpo", {}),
    "rrhf": ("rrhf", {}),
}
SHARDED = ["sft", "dpo", "kto", "rewardModel"]


def run_of(folder: Path, method: str, lora: Any, **changes: Any) -> StageRun:
    type_, stage = METHODS[method]
    settings = {**SETTINGS, **changes}
    stage = {**stage, **settings.pop("stage", {})}
    form = "ranked" if method == "rrhf" else ""
    return training_run(folder, type_, lora=lora, form=form, stage=stage, **settings)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one rank gives, once per method and kind of training."""
    known: dict[str, Outcome] = {}

    def found(method: str, lora: Any) -> Outcome:
        key = f"{method}-{lora is not None}"
        if key not in known:
            folder = tmp_path_factory.mktemp(key)
            known[key] = outcome_of(folder, run_of(folder, method, lora))
        return known[key]

    return found


@pytest.mark.parametrize("method", METHODS)
def test_four_ranks_and_any_accumulation_give_the_numbers_of_one(tmp_path: Path, method: str, alone: Any) -> None:
    """1 × 4 = 4 × 1: several micro-batches in turn, one for the whole step, and four ranks of which some idle."""
    one = alone(method, LORA)
    for name, changes in (("4x1", {"processes": 4}), ("1x1", {"tokensPerBatch": 4096})):
        folder = tmp_path / name
        assert_same(one, outcome_of(folder, run_of(folder, method, LORA, **changes)))


@pytest.mark.parametrize(
    ("method", "lora", "ranks"),
    [(method, lora, 4) for method in SHARDED for lora in (LORA, None)] + [("sft", None, 2), ("dpo", LORA, 2)],
)
def test_sharded_ranks_give_the_numbers_of_one(tmp_path: Path, method: str, lora: Any, ranks: int, alone: Any) -> None:
    run = run_of(tmp_path, method, lora, sharding="full", processes=ranks)
    assert_same(alone(method, lora), outcome_of(tmp_path, run))
    assert manifest_of(run).metrics["plainPath"] == 0


@pytest.mark.parametrize("method", SHARDED)
def test_replicated_ranks_give_the_numbers_of_one_with_all_weights_trained(
    tmp_path: Path, method: str, alone: Any
) -> None:
    assert_same(alone(method, None), outcome_of(tmp_path, run_of(tmp_path, method, None, processes=4)))


@pytest.mark.parametrize(
    ("method", "lora", "changes"),
    [
        ("sft", None, {"gradientCheckpointing": True}),
        ("dpo", LORA, {"gradientCheckpointing": True}),
        ("sft", None, {"l2sp": 0.1, "layerDecay": 0.8, "weightDecay": 0.1, "gradientClip": 0.5}),
        ("sft", LORA, {"l2sp": 0.1, "stage": {"kl": {"coefficient": 0.5}}}),
        ("sft", None, {"style": "gemma2", "stage": {"freeze": {"layers": 1, "modules": ["embed_tokens"]}}}),
        ("dpo", None, {"style": "gpt2"}),
        ("dpo", EVERYTHING, {"style": "qwen2"}),
        ("rewardModel", None, {"selectBest": True, "evaluateEverySteps": 1, "learningRate": 0.03, "evaluation": 0.3}),
    ],
    ids=["checkpointing", "lora checkpointing", "penalty", "kl", "gemma2", "gpt2", "everything", "selected"],
)
def test_what_a_stage_can_ask_for_is_the_same_on_three_sharded_ranks(
    tmp_path: Path, method: str, lora: Any, changes: dict[str, Any]
) -> None:
    """Three ranks cut nothing evenly."""
    outcomes = []
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        run = run_of(folder, method, lora, **changes, sharding="full", processes=processes)
        outcomes.append(outcome_of(folder, run))
    assert_same(*outcomes)


@pytest.mark.parametrize(("method", "lora"), [("sft", None), ("dpo", LORA), ("rewardModel", None), ("orpo", LORA)])
def test_the_plain_path_is_sharded_too(tmp_path: Path, method: str, lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the model runs once per answer, and ranks have unequal numbers of them."""
    monkeypatch.setattr(loop, "choose_path", lambda *_args, **_more: PathChoice("plain", "asked for"))
    outcomes = []
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        run = run_of(folder, method, lora, sharding="full", processes=processes)
        outcomes.append(outcome_of(folder, run))
        assert manifest_of(run).metrics["plainPath"] == 1
    assert_same(*outcomes)


def test_a_fast_path_that_fails_half_way_leaves_a_sharded_model_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plumbline_trainer.engine import attention

    def fail(*_args: Any, **_more: Any) -> Any:
        raise FastPathError("not this model")

    monkeypatch.setattr(attention, "can_join", lambda *_: False)
    monkeypatch.setattr(attention, "_attend", fail)
    outcomes = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run = run_of(folder, "sft", None, sharding="full", processes=processes)
        outcomes.append(outcome_of(folder, run))
        assert manifest_of(run).metrics["plainPath"] == 1
    assert_same(*outcomes)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_rank_keeps_its_part_only(tmp_path: Path, lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TrainingRun.train

    def measured(run: TrainingRun, *args: Any, **more: Any) -> None:
        real(run, *args, **more)
        moments = run.optimizer.adamw.state.values()
        kept = {
            "frozen": [own_part(p).numel() for p in run.scorer.parameters() if not p.requires_grad],
            "trained": [own_part(p).numel() for p in run.trainables.values()],
            "moments": [state["exp_avg"].numel() for state in moments],
            "all": [p.numel() for p in run.scorer.parameters()],
            "whole": [p.numel() for p in run.scorer.parameters() if not is_sharded(p)],
        }
        (tmp_path / f"kept-{run.ranks.rank}.json").write_text(json.dumps({k: sum(v) for k, v in kept.items()}))

    monkeypatch.setattr(TrainingRun, "train", measured)
    run_ranks(tmp_path, run_of(tmp_path, "sft", lora, sharding="full", processes=4))
    parts = [json.loads((tmp_path / f"kept-{rank}.json").read_text()) for rank in range(4)]
    for part in parts:
        assert part["moments"] == part["trained"]
        shared_out = part["all"] - part["whole"]
        own = part["frozen"] if lora else part["trained"]
        assert own <= 0.3 * shared_out
        assert part["whole"] == (part["trained"] if lora else 0)
    sums = {name: sum(part[name] for part in parts) for name in ("frozen", "trained")}
    assert sums["frozen" if lora else "trained"] == parts[0]["all"] - parts[0]["whole"]


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank kills itself before a step."""
    real = TrainingRun._take_step

    def watched(run: TrainingRun, objective: Any) -> None:
        if run.state.step == step:
            wait_for_uploads(run.context)
            run.ranks.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        real(run, objective)

    monkeypatch.setattr(TrainingRun, "_take_step", watched)


RESUMED: dict[str, Any] = {"checkpointEverySteps": 1, "weightDecay": 0.1}


@pytest.mark.parametrize(
    ("method", "lora", "changes"),
    [
        ("sft", None, {}),
        ("dpo", LORA, {}),
        ("kto", None, {}),
        ("rewardModel", None, {"selectBest": True, "evaluateEverySteps": 1}),
    ],
)
def test_sharded_ranks_that_were_killed_end_with_the_same_bits(
    tmp_path: Path, method: str, lora: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**RESUMED, **changes, "sharding": "full", "processes": 2}
    whole_run = run_of(tmp_path / "whole", method, lora, **settings)
    whole = outcome_of(tmp_path / "whole", whole_run)
    run = run_of(tmp_path / "killed", method, lora, **settings)
    with monkeypatch.context() as patch:
        kill_at(2, patch)
        run_killed_ranks(tmp_path / "killed" / "one", run)
    resumed = outcome_of(tmp_path / "killed" / "two", run)
    assert resumed.first_step == 2
    assert resumed.weights.keys() == whole.weights.keys()
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())


@pytest.mark.parametrize(
    ("lora", "before", "after"),
    [
        (LORA, {"sharding": "none", "processes": 2}, {"sharding": "full", "processes": 4}),
        (None, {"sharding": "none", "processes": 2}, {"sharding": "full", "processes": 3}),
        (None, {"sharding": "full", "processes": 4}, {"sharding": "none", "processes": 1}),
        (None, {"sharding": "full", "processes": 2}, {"sharding": "full", "processes": 3}),
    ],
    ids=["lora into sharded", "full into sharded", "full out of sharded", "full onto more ranks"],
)
def test_a_checkpoint_is_taken_up_under_another_sharding(
    tmp_path: Path, lora: Any, before: dict[str, Any], after: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = outcome_of(tmp_path / "whole", run_of(tmp_path / "whole", "dpo", lora, **RESUMED))
    folder = tmp_path / "killed"
    first = run_of(folder, "dpo", lora, **RESUMED, **before)
    with monkeypatch.context() as patch:
        kill_at(2, patch)
        run_killed_ranks(folder / "one", first)
    second = run_of(folder, "dpo", lora, **RESUMED, **after)
    # Sharding is a parameter of the stage; here the same stage goes on under another one.
    resumed = outcome_of(folder / "two", second.model_copy(update={"fingerprint": first.fingerprint}))
    assert resumed.first_step == 2
    # Of the curve what the second attempt added: its step, and the evaluation at the end.
    assert_same(Outcome(whole.curve[-2:], whole.weights), Outcome(resumed.curve[-2:], resumed.weights))


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_later_stage_takes_what_sharded_ranks_wrote(tmp_path: Path, lora: Any, alone: Any) -> None:
    """Loading checks the digest of the merged weights, which rank 0 took from a model put together."""
    run = run_of(tmp_path, "sft", lora, sharding="full", processes=2)
    run_ranks(tmp_path, run)
    assert manifest_of(run).meta["form"] == ("adapter" if lora else "full")
    next_run = run_of(tmp_path, "dpo", LORA, sharding="full", processes=2)
    inputs = [output_of(run), *next_run.inputs[1:], next_run.inputs[0].model_copy(update={"role": "reference"})]
    outcomes = []
    for processes in (1, 2):
        changed = next_run.model_copy(update={"inputs": inputs, "processes_per_node": processes})
        changed = changed.model_copy(update={"fingerprint": f"{processes}" * 64})
        outcomes.append(outcome_of(tmp_path / f"next-{processes}", changed))
    assert_same(*outcomes)
    margins = [line["evalRewardMargin"] for line in outcomes[0].curve if "evalRewardMargin" in line]
    assert margins[0] != 0, "the reference is another model"


@pytest.mark.parametrize("lora", [EVERYTHING, None], ids=["lora", "full"])
def test_bfloat16_is_sharded_within_its_rounding(tmp_path: Path, lora: Any) -> None:
    outcomes = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        changes: dict[str, Any] = {"precision": "bfloat16", "dtype": "bfloat16", "processes": processes}
        outcomes.append(outcome_of(folder, run_of(folder, "sft", lora, sharding="full", **changes)))
    for one, other in zip(*(outcome.curve for outcome in outcomes), strict=True):
        for name in {"loss", "evalLoss"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=2e-3)


def test_rows_are_cut_and_put_together_also_where_a_rank_gets_none() -> None:
    """1, 2, 5 and 9 rows on four ranks: ⌈rows / 4⌉ each from the first."""
    sizes = {"one": (1, 3), "two": (2,), "five": (5, 2), "nine": (9,)}

    def work(ranks: Ranks) -> Any:
        module = nn.Module()
        for name, size in sizes.items():
            module.register_parameter(name, nn.Parameter(torch.zeros(size)))
        fully_shard(module, mesh=init_device_mesh("cpu", (ranks.size,)))
        trained = dict(module.named_parameters())
        optimizer = Optimizer(trained, Training(learning_rate=0.5, schedule=Schedule(warmup_ratio=0.0)), steps=2)
        for name, parameter in trained.items():
            value = torch.arange(float(math.prod(sizes[name]))).reshape(sizes[name])
            put(parameter, value)
            assert torch.equal(whole(parameter), value)
            parameter.grad = sharded_like(own_part(value_like(parameter, 2.0)), parameter)
        norm = optimizer.step(ranks)
        moved = gathered(trained, keeps=ranks.is_main)
        kept = {name: len(own_part(parameter)) for name, parameter in trained.items()}
        return norm, {name: tensor.tolist() for name, tensor in moved.items()}, kept

    def value_like(parameter: torch.Tensor, value: float) -> torch.Tensor:
        return torch.full_like(own_part(parameter), value)

    found = in_ranks(4, work)
    assert [kept for _, _, kept in found] == [
        {"one": 1, "two": 1, "five": 2, "nine": 3},
        {"one": 0, "two": 1, "five": 2, "nine": 3},
        {"one": 0, "two": 0, "five": 1, "nine": 3},
        {"one": 0, "two": 0, "five": 0, "nine": 0},
    ]
    numbers = sum(math.prod(size) for size in sizes.values())
    assert [norm for norm, _, _ in found] == [pytest.approx(2.0 * math.sqrt(numbers))] * 4
    first, *others = (moved for _, moved, _ in found)
    assert others == [{}] * 3
    # Adam's first step is the learning rate, whatever the gradient.
    assert first["nine"] == pytest.approx([index - 0.5 for index in range(9)])
    assert first["five"][4] == pytest.approx([7.5, 8.5])


def test_what_cannot_be_sharded_is_refused() -> None:
    base: dict[str, Any] = {"dataset": "data", "training": {"sharding": "full"}}
    TRAINING_STAGES["sft"].model_validate({**base, "ewc": {"dataset": "other"}, "kl": {"baseModel": True}})
    online = {"prompts": "data", "rewards": [{"rule": "length"}], "training": {"sharding": "full"}}
    with pytest.raises(ValidationError, match="sampling needs them whole"):
        Grpo.model_validate(online)
    with pytest.raises(ValidationError, match=r"lora\.quantization packs them in blocks"):
        TRAINING_STAGES["dpo"].model_validate({**base, "lora": {"rank": 4, "quantization": "nf4"}})


def test_layers_that_share_weights_are_refused() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(InputError, match="share weights with each other; set it to none"):
        _layers(Scorer(model))
