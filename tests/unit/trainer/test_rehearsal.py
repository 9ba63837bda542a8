"""Rows of other datasets among a stage's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.methods import Sft
from plumbline_trainer.engine.loop import TrainingRun
from pydantic import ValidationError
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.trainer import manifest_of, output_folder, run_in_process
from support.training_data import training_run

SETTINGS: dict[str, Any] = {
    "lora": {"rank": 4},
    "globalBatch": 4,
    "learningRate": 1e-2,
    "stage": {"rehearsal": [{"dataset": "old", "share": 0.25}, {"dataset": "notes", "share": 0.25}]},
    "others": {"rehearsal.0.dataset": "promptCompletion", "rehearsal.1.dataset": "text"},
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("type_", ["sft", "pretrain"])
def test_every_step_holds_each_datasets_share(tmp_path: Path, type_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    real = TrainingRun._accumulate

    def noted(self: TrainingRun, objective: Any, rows: Any) -> Any:
        seen.append([self.rows.index(row) for row in rows])
        return real(self, objective, rows)

    monkeypatch.setattr(TrainingRun, "_accumulate", noted)
    run = training_run(tmp_path, type_, **SETTINGS)
    result, code = run_in_process(tmp_path, run)
    assert code == 0, result.message
    metrics = manifest_of(run).metrics
    assert metrics["rows"] == 24
    assert metrics["steps"] == len(seen) == 12
    for step in seen:
        assert sorted(row // 24 for row in step) == [0, 0, 1, 2]
    assert sorted(row for step in seen for row in step if row < 24) == list(range(24))


def test_what_is_rehearsed_is_kept(tmp_path: Path) -> None:
    """Learning by heart with and without the second dataset: its loss stays lower where it is rehearsed."""
    from plumbline_trainer.data.encode import encode_rows
    from plumbline_trainer.data.loading import load_rows
    from plumbline_trainer.engine.scoring import score_rows
    from plumbline_trainer.models.policy import load_policy
    from support.trainer import output_of, stage_context

    losses = {}
    for name in ("plain", "rehearsed"):
        folder = tmp_path / name
        run = training_run(folder, "sft", **{**SETTINGS, "epochs": 3})
        if name == "plain":
            parameters = {key: value for key, value in run.parameters.items() if key != "rehearsal"}
            run = run.model_copy(update={"parameters": parameters})
        assert run_in_process(folder, run)[1] == 0
        context = stage_context(folder, run)
        policy = load_policy(context, output_of(run), precision="float32", device="cpu")
        rows = load_rows(context, context.input("rehearsal.0.dataset"), "train")
        encoded = encode_rows(rows, policy.tokenizer, method="completion", max_length=256).rows
        scores = score_rows(policy.model, encoded, tokens_per_batch=2048, device=torch.device("cpu"))
        losses[name] = -float(torch.cat([tokens for row in scores for tokens in row]).mean())
    assert losses["rehearsed"] < losses["plain"]


def test_two_ranks_give_the_same(tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run = training_run(folder, "sft", **SETTINGS, maxSteps=4, tokensPerBatch=128, processes=processes)
        run_ranks(folder, run)
        found.append((manifest_of(run).metrics["loss"], load_file(next(output_folder(run).glob("*.safetensors")))))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    gap = sum(float((tensor - found[1][1][name]).square().sum()) for name, tensor in found[0][1].items())
    assert math.sqrt(gap) < 1e-4


def test_shares_leave_room_for_the_own_rows() -> None:
    with pytest.raises(ValidationError, match=r"the shares sum to 1\.2 and leave no room for dataset"):
        Sft.model_validate(
            {"dataset": "a", "rehearsal": [{"dataset": "b", "share": 0.6}, {"dataset": "c", "share": 0.6}]}
        )
