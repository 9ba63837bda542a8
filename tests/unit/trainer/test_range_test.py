"""Learning-rate range test: the sweep, the suggestion, the end, and what it leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from plumbline_api.training import Training
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.range_test import diverges, smoothed, suggest
from plumbline_trainer.stages import sft
from plumbline_trainer.storage.checkpoints import wait_for_uploads
from pydantic import ValidationError
from support.ranks import run_ranks
from support.trainer import manifest_of, output_folder, run_in_process, stage_context
from support.training_data import training_run


def test_smoothing_by_hand() -> None:
    """m₁ = 0.1·2 / 0.1 = 2; m₂ = (0.9·0.2 + 0.1·4) / 0.19 = 0.58 / 0.19."""
    assert smoothed([2.0, 4.0]) == pytest.approx([2.0, 0.58 / 0.19])
    assert smoothed([3.0] * 9) == pytest.approx([3.0] * 9)


def sweep(count: int = 101) -> list[float]:
    return [1e-6 * 10 ** (5 * step / (count - 1)) for step in range(count)]


def test_the_steepest_place_is_suggested() -> None:
    """A loss that falls around 10⁻³ and rises again at the end; smoothing looks back, so it is seen a little late."""
    rates = sweep()
    losses = [3.0 - math.tanh(3 * (math.log10(rate) + 3)) + max(0.0, math.log10(rate) + 1.5) ** 2 for rate in rates]
    found = suggest(rates, losses)
    assert found is not None
    assert 1e-3 < found < 10**-2.4


def test_nothing_is_suggested_where_the_loss_never_falls() -> None:
    assert suggest(sweep(), [1.0 + 0.01 * step for step in range(101)]) is None
    assert suggest([1e-3, 1e-2], [3.0, 1.0]) is None, "too few points"
    assert suggest([], []) is None


def test_divergence_is_a_rise_by_what_the_loss_was_at_first() -> None:
    assert not diverges([2.0, 2.0, 1.5, 1.5, 1.4])
    assert not diverges([2.0] * 10 + [8.0]), "smoothed 2.9"
    assert diverges([2.0] * 10 + [40.0])
    assert not diverges([0.7, 0.7, 90.0]), "the first steps do not count"


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"from \(0\.1\) must be below to \(0\.01\)"):
        Training.model_validate({"rangeTest": {"from": 0.1, "to": 0.01}})
    with pytest.raises(ValidationError, match="yields no weights to choose from; leave earlyStopping out"):
        Training.model_validate({"rangeTest": {}, "earlyStopping": {}, "evaluateEverySteps": 2})


SETTINGS: dict[str, Any] = {"globalBatch": 4, "checkpointEverySteps": 4, "tokensPerBatch": 256, "evaluation": 0.2}


@pytest.mark.parametrize(
    ("type_", "lora"),
    [
        ("sft", {"rank": 4}),
        ("pretrain", None),
        ("dpo", {"rank": 4}),
        ("kto", {"rank": 4}),
        ("rewardModel", {"rank": 4}),
        ("rrhf", {"rank": 4}),
        ("awr", {"rank": 4}),
    ],
)
def test_a_stage_sweeps_and_leaves_a_report(tmp_path: Path, type_: str, lora: Any) -> None:
    test = {"from": 1e-5, "to": 3.0, "steps": 60}
    # With weights that differ much, the loss of so few rows tells more of the rows than of the rate.
    stage = {"beta": 100} if type_ == "awr" else {}
    run = training_run(tmp_path, type_, lora=lora, stage=stage, **SETTINGS, maxSteps=2, rangeTest=test)
    result, code = run_in_process(tmp_path, run)
    assert code == 0, result.message
    manifest, folder = manifest_of(run), output_folder(run)
    assert manifest.kind == "report"
    assert {file.path for file in manifest.files} == {"range-test.json", "range-test.svg"}
    document = json.loads((folder / "range-test.json").read_text())
    rates = [point["learningRate"] for point in document["points"]]
    assert rates == pytest.approx([1e-5 * 3e5 ** (step / 59) for step in range(len(rates))])
    suggested = manifest.metrics["suggestedLearningRate"]
    assert document["suggestedLearningRate"] == suggested
    assert 1e-4 < suggested < 1.0
    assert f"{suggested:.2g}" in result.message
    assert len(rates) == manifest.metrics["steps"]
    if type_ == "pretrain":  # with few trained weights a random model hardly gets worse than it began
        assert len(rates) < 60, "a rate of 3 diverges"
        assert "diverged at a learning rate of" in document["ended"]
    plot = (folder / "range-test.svg").read_text()
    assert plot.startswith("<svg")
    assert "var(--" not in plot
    assert "learning rate" in plot


def test_a_mild_sweep_reaches_its_end(tmp_path: Path) -> None:
    run = training_run(tmp_path, "sft", lora={"rank": 4}, **SETTINGS, rangeTest={"from": 1e-5, "to": 1e-3, "steps": 12})
    assert run_in_process(tmp_path, run)[1] == 0
    document = json.loads((output_folder(run) / "range-test.json").read_text())
    assert len(document["points"]) == 12
    assert document["ended"] == "the sweep reached its end"
    assert document["points"][-1]["learningRate"] == pytest.approx(1e-3)


def test_a_resumed_sweep_and_one_on_two_ranks_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**SETTINGS, "lora": {"rank": 4}, "rangeTest": {"from": 1e-5, "to": 3.0, "steps": 40}}
    whole = training_run(tmp_path / "whole", "sft", **settings)
    assert run_in_process(tmp_path / "whole", whole)[1] == 0
    expected = (output_folder(whole) / "range-test.json").read_bytes()

    run = training_run(tmp_path / "killed", "sft", **settings)
    context = stage_context(tmp_path / "killed" / "one", run)
    real = TrainingRun._take_step

    class Killed(BaseException):
        pass

    def dying(training: TrainingRun, objective: Any) -> None:
        if training.state.step == 11:
            wait_for_uploads(context)
            raise Killed
        real(training, objective)

    monkeypatch.setattr(TrainingRun, "_take_step", dying)
    with pytest.raises(Killed):
        sft.run(context)
    monkeypatch.setattr(TrainingRun, "_take_step", real)
    output = sft.run(stage_context(tmp_path / "killed" / "two", run))
    assert output is not None
    assert output.first_step == 8
    assert (output.folder / "range-test.json").read_bytes() == expected

    ranks = training_run(tmp_path / "ranks", "sft", **settings, processes=2)
    run_ranks(tmp_path / "ranks", ranks)
    found = json.loads((output_folder(ranks) / "range-test.json").read_text())
    assert len(found["points"]) == pytest.approx(len(json.loads(expected)["points"]), abs=2)
    for one, two in zip(json.loads(expected)["points"][:15], found["points"], strict=False):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
