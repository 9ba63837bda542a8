"""Stages that sample in the report: curves, verdicts, aborts; from storage to the page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from plumbline_api.names import FINALIZE
from plumbline_api.stagerun import StageOutcome, StageRun
from plumbline_trainer.context import StageOutput
from plumbline_trainer.launcher import already_done
from plumbline_trainer.report.facts import Point, gather
from plumbline_trainer.report.rollouts import draw_rollouts
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.manifests import commit_output
from plumbline_trainer.watch.course import Course
from plumbline_trainer.watch.ending import watched
from support import trainer

REASON = "length.growth above 2 for 3 steps (now 2.4)"
MESSAGE = f"{REASON}; the output is the last good weights, those after iteration 12"


def point(step: int, **more: float) -> Point:
    place = step / 20
    return Point(
        step,
        {
            "reward": 1 + place,
            "kl": 4 * place,
            "entropy": 2 - place,
            "length.mean": 50 * (1 + place),
            "clipFraction": 0.1,
            "repetition": 0.05,
            "reward.length": 50.0,
            "reward.rm": place,
            "timeGenerating": 0.6,
            "timeScoring": 0.1,
            "timeTraining": 0.3,
            **more,
        },
    )


def test_curves_show_rewards_their_price_and_the_time():
    points = [point(step) for step in range(1, 21)]
    for at, gold in ((0, 0.5), (9, 0.7), (19, 0.3)):
        points[at].metrics.update({"evalReward": gold + 1, "goldReward": gold, "sycophancy": 0.25, "evalLength": 50.0})
    figures = draw_rollouts("rl", points)
    titles = [figure.title for figure in figures]
    assert titles == [
        "Reward",
        "Reward over KL",
        "Reward “length”",
        "Reward “rm”",
        "Gold reward on held-out prompts",
        "KL to the reference, per answer",
        "Entropy per token",
        "Length of answers, in tokens",
        "Repeated 3-grams within answers",
        "Clipped ratios",
        "Answers that turn to the user's opinion",
        "Where the time went",
    ]
    by_title = dict(zip(titles, figures, strict=True))
    assert by_title["Reward"].summary == "Reward: 1.05 at step 1, 2 at step 20; on held-out rows 1.5, then 1.3"
    assert by_title["Reward over KL"].summary == "Reward over KL: 1.05 at KL 0.2, 2 at KL 4"
    assert by_title["Gold reward on held-out prompts"].summary == (
        "Gold reward on held-out prompts: 0.5 at step 1, then 0.3"
    )
    assert by_title["Where the time went"].summary == "Where the time went: 60% sampling, 10% scoring, 30% training"
    assert all(figure.svg.startswith("<svg aria-hidden") for figure in figures)
    # The held-out rewards lie over the KL of their steps: three markers on the frontier.
    assert by_title["Reward over KL"].svg.count("var(--orange)") > 0


def test_without_a_second_reward_or_evaluations_there_is_less_to_draw():
    points = [Point(step, {"reward": 1.0, "kl": float(step)}) for step in (1, 2)]
    assert [figure.title for figure in draw_rollouts("rl", points)] == [
        "Reward",
        "Reward over KL",
        "KL to the reference, per answer",
    ]
    assert draw_rollouts("rl", points[:1]) == []


@pytest.fixture
def pipeline(tmp_path: Path) -> trainer.LocalPipeline:
    rl = {
        "name": "rl",
        "abortWhen": [{"metric": "length.growth", "above": 2, "for": 3}],
        "onAbort": "continue",
        "grpo": {"prompts": "asks", "rewards": [{"rule": "length"}]},
    }
    body = {
        "apiVersion": "plumbline.dev/v1alpha1",
        "kind": "AlignmentPipeline",
        "metadata": {"name": "small"},
        "spec": {
            "model": {"source": f"file://{tmp_path}/base"},
            "datasets": [{"name": "asks", "source": f"file://{tmp_path}/asks.jsonl", "format": "prompt"}],
            "stages": [rl],
        },
    }
    made = trainer.LocalPipeline(body, tmp_path)
    made.pins = ["a" * 64, "b" * 64]
    return made


def commit(pipeline: trainer.LocalPipeline, folder: Path, *, aborted: str | None, hacked: bool = True) -> StageOutput:
    """The output and the curves of the stage, as a trainer leaves them."""
    context = trainer.stage_context(folder / "rl", pipeline.stage("rl"))
    course, lines = Course(), []
    for step in range(1, 31):
        growth = step / 30 if hacked else 0.0
        figures = course.observe(
            {
                "reward": 1 + growth,
                "rewardStd": 0.5,
                "kl": 2 * growth,
                "length.mean": 50 * (1 + 1.5 * growth),
                "rewardLengthCorrelation": 0.9 if hacked else 0.1,
            }
        )
        lines.append(json.dumps({"step": step, "steps": 30, "metrics": figures}))
    context.store.put_bytes(uris.join(context.run_root, "metrics.jsonl"), "\n".join(lines).encode())
    output = StageOutput(
        folder=context.scratch / "output",
        kind="policy",
        meta={"form": "adapter"},
        metrics={"aborted": float(aborted is not None), "reward": 2.0},
    )
    output.folder.mkdir(parents=True)
    (output.folder / "adapter.json").write_text("{}")
    output = watched(output, course, aborted=aborted, kept="after iteration 12")
    commit_output(context, output)
    return output


def finalize(pipeline: trainer.LocalPipeline, folder: Path, outcomes: list[StageOutcome]) -> tuple[StageRun, Path]:
    run = StageRun(
        role="finalize",
        pipeline=pipeline.record.pipeline,
        stage=FINALIZE,
        type=FINALIZE,
        attempt=1,
        fingerprint="f",
        storage=pipeline.record.storage,
        record=pipeline.record,
        pins=pipeline.pins,
        outcomes=outcomes,
    )
    result, code = trainer.run_in_process(folder / "finalize", run)
    assert code == 0, result.message
    return run, Path(result.message.removeprefix("report: file://"))


def outcome(pipeline: trainer.LocalPipeline, phase: str, **given: str | None) -> StageOutcome:
    return StageOutcome(
        name="rl", type="grpo", phase=phase, fingerprint=pipeline.stage("rl").fingerprint, attempts=1, **given
    )


def visible(page: str) -> str:
    return page.partition("<main>")[2]


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_an_abort_and_the_verdict_stand_on_the_first_screen(pipeline, tmp_path, phase):
    output = commit(pipeline, tmp_path, aborted=REASON)
    assert output.message == MESSAGE
    run, report = finalize(pipeline, tmp_path, [outcome(pipeline, phase, reason="Aborted", message=MESSAGE)])
    page = visible(report.read_text())
    lead = page.partition("</section>")[0]
    assert f"tage rl was aborted: {MESSAGE}." in lead
    assert "reward follows length (ρ = 0.9): the reward is probably being hacked." in lead
    assert "Reward over KL" in page
    facts = gather(trainer.open_store(run.storage), run)
    assert facts.stage("rl").monitors["aborted"] == REASON
    assert facts.gaps == []


def test_a_clean_stage_says_so_among_the_checks_only(pipeline, tmp_path):
    assert commit(pipeline, tmp_path, aborted=None, hacked=False).message == ""
    _, report = finalize(pipeline, tmp_path, [outcome(pipeline, "Succeeded", reason="Completed")])
    page = visible(report.read_text())
    assert "hacking" not in page.partition("</section>")[0]
    assert "rl: no sign of reward hacking" in page


@pytest.mark.parametrize("aborted", [REASON, None])
def test_read_back_or_found_again_an_abort_is_told_in_the_same_words(pipeline, tmp_path, aborted):
    commit(pipeline, tmp_path, aborted=aborted)
    collected, code = trainer.run_in_process(tmp_path / "collect", pipeline.stage("rl", role="collect"))
    run = pipeline.stage("rl", attempt=2)
    found = already_done(trainer.open_store(run.storage), run)
    assert (code, found.exit_code, found.result.reused) == (0, 0, True)
    for result in (collected, found.result):
        assert math.isclose(result.metrics["aborted"], float(aborted is not None))
        assert (result.message == MESSAGE) == (aborted is not None)
