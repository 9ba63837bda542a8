"""examples/06-reward-model by the command, the planner and the real trainer on this machine: no cluster, no mock."""

import json
from pathlib import Path

import pytest
from support.examples import copy_example, run_example

# Seconds on a machine of its own; a busy one needs patience.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_reward_models_are_trained_measured_and_judge(tmp_path: Path) -> None:
    folder = copy_example("06-reward-model", tmp_path / "example")
    assert "accuracy" in run_example(folder)
    [state] = folder.glob("runs/default/pipelines/reward-model/*/state.json")
    results = {job["stage"]: job["result"] for job in json.loads(state.read_text())["jobs"]}
    assert set(results) == {"preflight", "sft", "reward", "ensemble", "exam", "finalize"}
    for name in ("reward", "ensemble"):
        figures = results[name]["metrics"]
        assert figures["accuracy.lower"] <= figures["accuracy"] <= figures["accuracy.upper"]
        assert 0 <= figures["calibrationError"] <= 0.5
        assert -1 <= figures["lengthSpearman"] <= 1
    assert "disagreement" not in results["reward"]["metrics"]
    assert results["ensemble"]["metrics"]["disagreement"] > 0
    exam = results["exam"]["metrics"]
    assert exam["winRate.wins"] + exam["winRate.ties"] + exam["winRate.losses"] == 6
    [report] = folder.glob("runs/default/pipelines/reward-model/*/report.html")
    page = report.read_text()
    assert page.count("Calibration, expected error") >= 2
    assert "reward model “ensemble”" in page
    [card] = folder.glob("runs/default/pipelines/reward-model/*/model-card.md")
    assert "## Reward models" in card.read_text()
