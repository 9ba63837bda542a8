"""examples/08-against-forgetting by the command and the real trainer on this machine."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.examples import copy_example, run_example

# Well under a minute on a machine of its own; a busy one needs patience.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_careful_stage_still_knows_the_questions(tmp_path: Path) -> None:
    folder = copy_example("08-against-forgetting", tmp_path / "example")
    run_example(folder)

    jobs = jobs_of(folder)
    assert list(jobs) == ["preflight", "manners", "probe", "careless", "careful", "exam", "finalize"]
    probe, careful, exam = (jobs[name]["result"]["metrics"] for name in ("probe", "careful", "exam"))
    assert 1e-5 < probe["suggestedLearningRate"] < 1.0
    assert careful["stoppedEarly"] in (0, 1)
    assert 0 < careful["selectedStep"] <= careful["steps"]
    assert careful["ewc"] > 0
    assert careful["evalLoss"] < careful["evalLossStart"], "it has learned something"
    assert exam["perplexity"] < 0.8 * exam["perplexity.baseline"], "the careless stage has forgotten more"

    [report] = folder.glob("runs/**/report.html")
    assert "suggested learning rate" in report.read_text()


def jobs_of(folder: Path) -> dict[str, Any]:
    """The jobs that were started, by stage, in order."""
    [state] = folder.glob("runs/default/pipelines/against-forgetting/*/state.json")
    return {job["stage"]: job for job in json.loads(state.read_text())["jobs"]}
