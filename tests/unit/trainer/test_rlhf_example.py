"""examples/09-rlhf, all of it through the local runner: its manifest and data, on a tiny model in place of the real one.

The run on the real model, whose curve docs/rlhf.md shows, took 36 minutes on two busy cores.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from plumbline_cli.local.runner import LocalRunner
from plumbline_cli.local.session import open_session
from support.forked_trainer import ForkingLauncher
from support.local_runs import Recorder
from support.tiny import save_model

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
REAL_MODEL = "bundled://smollm2-135m-instruct"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_the_three_steps_of_rlhf_run_as_written(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES / "01-quickstart" / "data", tmp_path / "01-quickstart" / "data")
    folder = tmp_path / "09-rlhf"
    folder.mkdir()
    text = (EXAMPLES / "09-rlhf" / "pipeline.yaml").read_text()
    assert REAL_MODEL in text
    (folder / "pipeline.yaml").write_text(text.replace(REAL_MODEL, "file://model"))
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
    assert status.phase == "Succeeded", [(stage.name, stage.reason, stage.message) for stage in status.stages]
    [path] = folder.glob("runs/default/ppo/*/manifest.json")
    manifest = json.loads(path.read_text())
    assert {parent["role"] for parent in manifest["parents"]} >= {"model", "prompts", "rewards.0.stage", "critic.start"}
    assert {"goldReward", "goldRewardStart", "reward.reward", "kl"} <= manifest["metrics"].keys()
    files = {entry["path"] for entry in manifest["files"]}
    assert {"adapter_model.safetensors", "critic/head.safetensors", "critic/critic.json", "monitors.json"} <= files
    report = next(folder.glob("runs/default/pipelines/rlhf/*/report.html")).read_text()
    assert "rlhf" in report
