"""Stages that learn from their own answers: whole runs on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plumbline_api.online import ONLINE_STAGES
from support.trainer import manifest_of, run_in_process
from support.training_data import training_run

ROLLOUT = {"maxNewTokens": 6}
REWARDS = [{"rule": "keywords", "keywords": ["plumb", "line"]}, {"rule": "length", "weight": -0.01}]


def online_run(folder: Path, type_: str, **fields: Any) -> Any:
    stage = {"rewards": REWARDS, "rollout": ROLLOUT, **fields.pop("stage", {})}
    fields = {"rows": 12, "lora": {"rank": 4}, "globalBatch": 4, "maxLength": 64, "maxSteps": 3} | fields
    return training_run(folder, type_, stage=stage, **fields)


@pytest.mark.parametrize("type_", ONLINE_STAGES)
def test_a_stage_runs_and_tells_its_figures(tmp_path: Path, type_: str) -> None:
    run = online_run(tmp_path, type_, evaluation=0.2)
    result, code = run_in_process(tmp_path, run)
    assert code == 0, result.message
    manifest = manifest_of(run)
    assert manifest.kind == "policy"
    for name in ("reward", "kl", "entropy", "length.mean", "reward.keywords", "clipFraction", "evalReward"):
        assert name in manifest.metrics, name
