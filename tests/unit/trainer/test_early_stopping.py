"""Which evaluation's weights a stage yields, when it stops, and that a resumed run decides alike."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.check import check
from plumbline_api.methods import EVALUATION_FIGURES
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.stagerun import METRICS_MAX
from plumbline_api.training import EarlyStopping, Training
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.selection import Selection
from plumbline_trainer.engine.state import TrainingState
from plumbline_trainer.errors import InputError
from plumbline_trainer.stages import sft
from plumbline_trainer.storage.checkpoints import wait_for_uploads
from pydantic import ValidationError
from safetensors.torch import load_file
from support.pipelines import pipeline_body
from support.ranks import run_ranks
from support.trainer import manifest_of, output_folder, run_in_process, stage_context
from support.training_data import training_run
from torch import nn


def watch(
    folder: Path, values: list[float], *, metric: str = "evalLoss", select: bool | None = None, **rule: Any
) -> tuple[list[bool], TrainingState, float]:
    """Show values one by one, with weights that tell their number; decisions, the state, and the weight put back."""
    stopping = EarlyStopping(metric=metric, **rule)
    training = Training(early_stopping=stopping, select_best=select, evaluate_every_steps=1)
    state, weight = TrainingState(), nn.Parameter(torch.zeros(1))
    selection = Selection(training, state, folder)
    decisions = []
    for number, value in enumerate(values):
        state.step = number
        weight.data.fill_(number)
        decisions.append(selection.observe({metric: value}, {"weight": weight}, writes=True))
    selection.put_back({"weight": weight})
    return decisions, state, weight.item()


def test_patience_counts_evaluations_without_improvement(tmp_path: Path) -> None:
    decisions, state, weight = watch(tmp_path, [3.0, 2.0, 2.5, 1.5, 1.6, 1.7], patience=2)
    assert decisions == [False, False, False, False, False, True]
    assert state.selected == {"evalLoss": 1.5, "step": 3.0}
    assert weight == 3.0
    assert "evalLoss has not improved for 2 evaluations" in state.ended


def test_small_improvements_are_selected_but_do_not_buy_patience(tmp_path: Path) -> None:
    """By hand, with 0.5 asked for: 2.0 sets the bar, 1.9 and 1.6 do not clear it, though 1.6 is the best."""
    decisions, state, weight = watch(tmp_path, [2.0, 1.9, 1.6], patience=2, min_delta=0.5)
    assert decisions == [False, False, True]
    assert weight == 2.0
    assert state.selected["evalLoss"] == 1.6


def test_more_may_be_better(tmp_path: Path) -> None:
    decisions, _, weight = watch(tmp_path, [0.5, 0.7, 0.7, 0.6], metric="evalRewardAccuracy", patience=2)
    assert decisions == [False, False, False, True]
    assert weight == 1.0, "of equals the first"
    _, _, weight = watch(tmp_path / "odd", [1.0, 4.0], metric="evalSomething", mode="max")
    assert weight == 1.0


def test_what_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    decisions, state, weight = watch(tmp_path, [math.nan, 2.0, math.inf, math.nan], patience=2)
    assert decisions == [False, False, False, True]
    assert weight == 1.0
    json.dumps(state.__dict__, allow_nan=False)


def test_the_last_weights_on_request(tmp_path: Path) -> None:
    decisions, state, weight = watch(tmp_path, [1.0, 2.0, 3.0], patience=2, select=False)
    assert decisions[-1]
    assert not state.selected
    assert weight == 2.0


def test_a_metric_that_is_not_there_is_named(tmp_path: Path) -> None:
    training = Training(early_stopping=EarlyStopping(metric="evalRewardAccuracy"), evaluate_every_steps=1)
    selection = Selection(training, TrainingState(), tmp_path)
    with pytest.raises(InputError, match=r"there is no evalRewardAccuracy.*give: evalLoss"):
        selection.observe({"evalLoss": 1.0}, {}, writes=True)


def test_fields_that_need_each_other() -> None:
    with pytest.raises(ValidationError, match="set evaluateEverySteps"):
        Training.model_validate({"earlyStopping": {}})
    with pytest.raises(ValidationError, match="set evaluateEverySteps"):
        Training.model_validate({"selectBest": True})
    with pytest.raises(ValidationError, match=r"whether less \(min\) or more \(max\)"):
        EarlyStopping.model_validate({"metric": "evalKl"})


def test_without_an_evaluation_split_it_is_refused(tmp_path: Path) -> None:
    run = training_run(tmp_path, "sft", lora={"rank": 4}, evaluateEverySteps=2, earlyStopping={})
    result, code = run_in_process(tmp_path, run)
    assert code == 2
    assert "training.earlyStopping: no held-out row" in result.message
    assert "split.evaluation" in result.message


SETTINGS: dict[str, Any] = {
    # Two dozen rows learned by heart: the held-out loss falls, then rises.
    "evaluation": 0.3,
    "globalBatch": 4,
    "epochs": 30,
    "learningRate": 2e-2,
    "schedule": {"type": "constant", "warmupRatio": 0.0},
    "checkpointEverySteps": 3,
    "evaluateEverySteps": 2,
    "tokensPerBatch": 256,
}


def evaluations(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "scratch" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["metrics"]["evalLoss"] for line in lines if "evalLoss" in line["metrics"]}


@pytest.mark.parametrize("lora", [{"rank": 4}, None])
def test_the_output_is_the_best_evaluation(tmp_path: Path, lora: Any) -> None:
    settings = {**SETTINGS, "learningRate": 2e-2 if lora else 3e-3}
    run = training_run(tmp_path, "sft", lora=lora, **settings, earlyStopping={"patience": 2})
    result, code = run_in_process(tmp_path, run)
    assert code == 0, result.message
    found, metrics = evaluations(tmp_path), manifest_of(run).metrics
    best = min(found, key=lambda step: (found[step], step))
    last = max(found)
    assert 0 < best < last < 90
    assert metrics["selectedStep"] == best
    assert metrics["evalLoss"] == found[best]
    assert metrics["stoppedEarly"] == 1
    assert metrics["steps"] == last == best + 4

    # A run that ends at that very step yields the same weights.
    short = training_run(tmp_path / "short", "sft", lora=lora, **settings, maxSteps=best)
    assert run_in_process(tmp_path / "short", short)[1] == 0
    assert weights_of(run).keys() == weights_of(short).keys()
    assert all(torch.equal(tensor, weights_of(short)[name]) for name, tensor in weights_of(run).items())


def weights_of(run: Any) -> dict[str, torch.Tensor]:
    return load_file(next(output_folder(run).glob("*.safetensors")))


class Killed(BaseException):
    """The process ends here, as far as the stage is concerned."""


def test_a_killed_run_selects_and_stops_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SETTINGS, "lora": {"rank": 4, "dropout": 0.1}, "earlyStopping": {"patience": 3}}
    whole = training_run(tmp_path / "whole", "sft", **settings)
    assert run_in_process(tmp_path / "whole", whole)[1] == 0
    metrics = manifest_of(whole).metrics
    best, last = int(metrics["selectedStep"]), int(metrics["steps"])

    folder = tmp_path / "killed"
    run = training_run(folder, "sft", **settings)
    real = TrainingRun._take_step
    # Before the best evaluation, between it and the end, and just before the end.
    deaths = sorted({max(best - 1, 4), best + 2, last - 1})
    for number, death in enumerate(deaths):
        context = stage_context(folder / f"attempt-{number}", run)

        def dying(training: TrainingRun, objective: Any, death: int = death, context: Any = context) -> None:
            if training.state.step == death:
                wait_for_uploads(context)
                raise Killed
            real(training, objective)

        monkeypatch.setattr(TrainingRun, "_take_step", dying)
        with pytest.raises(Killed):
            sft.run(context)
    monkeypatch.setattr(TrainingRun, "_take_step", real)
    output = sft.run(stage_context(folder / "last", run))
    assert output is not None
    assert output.first_step is not None
    assert 0 < output.first_step < last
    ours = load_file(next(output.folder.glob("*.safetensors")))
    assert all(torch.equal(tensor, ours[name]) for name, tensor in weights_of(whole).items())
    timing = {"tokensPerSecond"}
    assert {k: v for k, v in output.metrics.items() if k not in timing} == {
        k: v for k, v in metrics.items() if k not in timing
    }


def test_two_ranks_select_the_same(tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run = training_run(folder, "sft", **SETTINGS, earlyStopping={"patience": 2}, processes=processes)
        run_ranks(folder, run)
        found.append((manifest_of(run).metrics, weights_of(run)))
    (one, weights), (two, others) = found
    assert one["selectedStep"] == two["selectedStep"]
    assert one["evalLoss"] == pytest.approx(two["evalLoss"], rel=1e-4)
    assert all(torch.allclose(tensor, others[name], atol=1e-3) for name, tensor in weights.items())


def test_what_gates_may_ask_for_travels_with_everything_turned_on(tmp_path: Path) -> None:
    """20 figures fit into status; those that only tell how the stage went stand behind."""
    training = {"globalBatch": 4, "maxSteps": 2, "evaluateEverySteps": 1, "l2sp": 0.1, "earlyStopping": {}}
    ewc, rehearsal = {"dataset": "old", "rows": 2}, [{"dataset": "old", "share": 0.2}]
    everything: dict[str, tuple[dict[str, Any], set[str]]] = {
        "sft": (
            {"kl": {}, "ewc": ewc, "rehearsal": rehearsal},
            {"evalLoss", "kl", "ewc", "l2sp", "lostPart", "steps", "plainPath"},
        ),
        "dpo": ({"sftWeight": 0.5}, {"evalRewardAccuracy", "rewardMargin", "lostPart", "steps", "plainPath"}),
        "rewardModel": ({"heads": 2, "centring": 0.01}, {"accuracy.lower", "disagreement", "evalLoss", "l2sp"}),
    }
    for type_, (stage, wanted) in everything.items():
        others = {"ewc.dataset": "promptCompletion", "rehearsal.0.dataset": "text"} if type_ == "sft" else {}
        run = training_run(
            tmp_path / type_, type_, lora={"rank": 4}, evaluation=0.3, stage=stage, others=others, **training
        )
        result, code = run_in_process(tmp_path / type_, run)
        assert code == 0, result.message
        assert len(result.metrics) == METRICS_MAX or type_ == "sft"
        assert wanted | {"selectedStep", "stoppedEarly", "droppedRows", "truncatedRows"} <= result.metrics.keys(), type_


@pytest.mark.parametrize(
    ("type_", "stage"),
    [("sft", {}), ("rewardModel", {}), ("dpo", {"sftWeight": 1}), ("orpo", {}), ("kto", {}), ("rrhf", {}), ("awr", {})],
)
def test_the_checker_knows_the_figures_of_every_evaluation(tmp_path: Path, type_: str, stage: dict[str, Any]) -> None:
    stopping = {"metric": "evalNothing", "mode": "min"}
    run = training_run(
        tmp_path, type_, lora={"rank": 2}, stage=stage, evaluation=0.3, earlyStopping=stopping, evaluateEverySteps=1
    )
    result, code = run_in_process(tmp_path, run)
    assert code == 2
    assert set(result.message.partition("give: ")[2].split(", ")) == set(EVALUATION_FIGURES[type_])


def test_a_figure_that_a_stage_does_not_have_is_refused_by_the_checker() -> None:
    training = {"earlyStopping": {"metric": "evalRewardAcuracy", "mode": "max"}, "evaluateEverySteps": 5}
    datasets = [{"name": "prefs", "source": "s3://b/p.jsonl", "split": {"evaluation": 0.1}}]
    for kind, hint in (("dpo", "Did you mean evalRewardAccuracy?"), ("sft", "There are: evalLoss")):
        body = pipeline_body(
            datasets=datasets, stages=[{"name": "a", kind: {"dataset": "prefs", "training": training}}]
        )
        [problem] = check(AlignmentPipeline.parse(body))
        assert problem.path == f"spec.stages[0].{kind}.training.earlyStopping.metric"
        assert problem.message == f'evaluations of {kind} have no "evalRewardAcuracy". {hint}'
