"""examples/04-preference-methods, all of it, through the local runner."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from plumbline_api.methods import Dpo
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.stages import Stage
from plumbline_api.status import PipelineStatus
from plumbline_cli.local.runner import LocalRunner
from plumbline_cli.local.session import Session, open_session
from support.forked_trainer import ForkingLauncher
from support.local_runs import Recorder
from support.tiny import save_model

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "04-preference-methods"

# Some twenty stages of a second each on a machine of its own; a busy one needs patience.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run_example(folder: Path) -> tuple[Session, PipelineStatus]:
    session = open_session(str(folder / "pipeline.yaml"), storage=folder / "runs")
    runner = LocalRunner(
        folder=session.folder,
        state=session.state,
        settings=session.settings,
        launch=ForkingLauncher(session.folder),
        observer=Recorder(),
        parallel=1,
    )
    return session, runner.run()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, PipelineStatus]:
    folder = tmp_path_factory.mktemp("example") / "methods"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("model", "runs"))
    save_model(folder / "model")
    return run_example(folder)


def stages_of(session: Session) -> list[Stage]:
    return AlignmentPipeline.parse(session.state.body).spec.stages


def metrics_of(status: PipelineStatus, stage: str) -> dict[str, float]:
    entry: Any = next(entry for entry in status.stages if entry.name == stage)
    return {metric.name: float(metric.value) for metric in entry.metrics}


def test_every_stage_ends_well(done: tuple[Session, PipelineStatus]) -> None:
    session, status = done
    found = {entry.name: (entry.phase, entry.message) for entry in status.stages}
    assert status.phase == "Succeeded", found
    declared = [stage.name for stage in stages_of(session)]
    assert {phase for phase, _ in found.values()} == {"Succeeded"}, found
    assert set(declared) <= set(found)
    for name in declared:
        assert metrics_of(status, name)["steps"] == 2
        assert metrics_of(status, name)["plainPath"] == 0


def test_it_shows_every_method_on_pairs(done: tuple[Session, PipelineStatus]) -> None:
    """A new loss belongs into the example."""
    stages = stages_of(done[0])
    assert {stage.type for stage in stages} == {"sft", "dpo", "orpo", "simpo", "cpo", "rrhf"}
    losses = Dpo.model_json_schema()["properties"]["loss"]["enum"]
    assert {stage.dpo.loss for stage in stages if stage.dpo is not None} == set(losses)


def test_all_start_from_one_policy_and_end_apart(done: tuple[Session, PipelineStatus]) -> None:
    _, status = done
    losses = {
        entry.name: metrics_of(status, entry.name)["evalLossStart"]
        for entry in status.stages
        if "evalLossStart" in metrics_of(status, entry.name)
    }
    assert losses["sigmoid"] == pytest.approx(losses["conservative"], abs=1e-5)
    assert losses["sigmoid"] == pytest.approx(0.6931, abs=1e-4)
    assert len(losses) == 16
    digests = [entry.output.digest for entry in status.stages if entry.output is not None]
    assert len(set(digests)) == len(digests)
