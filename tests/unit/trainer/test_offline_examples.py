"""examples/10-offline-rl and 11-best-of-n, all of them, through the local runner."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from plumbline_api.status import PipelineStatus
from plumbline_cli.local.runner import LocalRunner
from plumbline_cli.local.session import open_session
from support.forked_trainer import ForkingLauncher
from support.local_runs import Recorder
from support.tiny import save_model

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"

# Seconds on a machine of its own; a busy one needs patience.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run_example(folder: Path, name: str) -> PipelineStatus:
    shutil.copytree(EXAMPLES / name, folder, ignore=shutil.ignore_patterns("model", "runs"))
    save_model(folder / "model")
    session = open_session(str(folder / "pipeline.yaml"), storage=folder / "runs")
    runner = LocalRunner(
        folder=session.folder,
        state=session.state,
        settings=session.settings,
        launch=ForkingLauncher(session.folder),
        observer=Recorder(),
        parallel=1,
    )
    status = runner.run()
    assert status.phase == "Succeeded", {entry.name: (entry.phase, entry.message) for entry in status.stages}
    return status


def metrics_of(status: PipelineStatus, stage: str) -> dict[str, float]:
    entry: Any = next(entry for entry in status.stages if entry.name == stage)
    return {metric.name: float(metric.value) for metric in entry.metrics}


def test_scores_tell_good_answers_from_bad_ones(tmp_path: Path) -> None:
    status = run_example(tmp_path / "example", "10-offline-rl")
    offline, exam = metrics_of(status, "offline"), metrics_of(status, "exam")
    assert offline["effectiveAnswers"] < offline["answers"]
    assert offline["evalLoss"] < offline["evalLossStart"]
    assert exam["preferenceAccuracy"] > exam["preferenceAccuracy.baseline"]


def test_the_second_round_begins_where_the_first_one_ended(tmp_path: Path) -> None:
    folder = tmp_path / "example"
    status = run_example(folder, "11-best-of-n")
    first, second = metrics_of(status, "first"), metrics_of(status, "second")
    assert first["rewardGain"] > 0
    assert second["reward"] > first["reward"] + 0.25 * first["rewardGain"]
    documents = sorted(folder.glob("runs/default/bestOfN/*/out-*/answers.jsonl"))
    assert len(documents) == 2
    for path in documents:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == 24
        assert all(len(row["responses"]) == 8 for row in rows)
        assert any(answer.get("label") == "chosen" for row in rows for answer in row["responses"])
    [report] = folder.glob("runs/default/pipelines/best-of-n/*/report.html")
    assert "reward of each prompt's best answer" in report.read_text().replace("&#39;", "'")
