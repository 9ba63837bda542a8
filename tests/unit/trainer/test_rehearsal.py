"""Rows of other datasets among a stage's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plumbline_api.methods import Dpo, Kto, Sft, least_mixed
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.schedule import plan_steps
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


PREFERENCES = ["dpo", "kto", "orpo", "simpo", "cpo", "rrhf", "awr"]
APART: dict[str, Any] = {
    "lora": {"rank": 4},
    "globalBatch": 8,
    "learningRate": 1e-2,
    "others": {"rehearsal.0.dataset": "promptCompletion"},
}


def rehearsing(share: float = 0.25, **stage: Any) -> dict[str, Any]:
    return {**APART, "stage": {"rehearsal": [{"dataset": "old", "share": share}], **stage}}


@pytest.mark.parametrize("type_", PREFERENCES)
def test_beside_a_loss_on_answers_rehearsed_rows_have_a_mean_of_their_own(
    tmp_path: Path, type_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of the first step is that of the stage alone plus γ times that of the mean −log p."""
    from plumbline_trainer.engine.optimizer import Optimizer

    seen: dict[str, dict[str, torch.Tensor]] = {}
    losses: dict[str, float] = {}

    def stop(name: str) -> Any:
        def step(self: Optimizer, *_: Any) -> float:
            seen[name] = {key: value.grad.clone() for key, value in self.trainables.items() if value.grad is not None}
            raise KeyboardInterrupt

        return step

    real = TrainingRun._take_step

    def own_only(self: TrainingRun, objective: Any) -> None:
        rows = [self.rows[index] for index in self.plan.own_rows(0)]
        losses["own"] = self._accumulate(objective, rows)["loss"]
        self.optimizer.step(self.ranks)

    def others_only(self: TrainingRun, _: Any) -> None:
        rows = [self.rows[index] for index in self.plan.rows(0) if index >= len(self.plan.row_ids)]
        assert len(rows) == 2
        losses["others"] = self._rehearse(rows)["rehearsalLoss"]
        self.optimizer.step(self.ranks)

    for name, taken in (("whole", real), ("own", own_only), ("others", others_only)):
        with monkeypatch.context() as patch:
            patch.setattr(TrainingRun, "_take_step", taken)
            patch.setattr(Optimizer, "step", stop(name))
            with pytest.raises(KeyboardInterrupt):
                run_in_process(tmp_path, training_run(tmp_path, type_, **rehearsing(rehearsalWeight=0.5)))
    assert losses["others"] > 0
    for key, whole in seen["whole"].items():
        torch.testing.assert_close(whole, seen["own"][key] + seen["others"][key], rtol=1e-4, atol=1e-7)
    assert max(float(gradient.abs().max()) for gradient in seen["others"].values()) > 0


@pytest.mark.parametrize("type_", ["dpo", "kto"])
def test_what_a_preference_stage_rehearses_gets_likelier(tmp_path: Path, type_: str) -> None:
    found = {}
    for weight in (1e-6, 2.0):
        folder = tmp_path / str(weight)
        settings = rehearsing(share=0.5, rehearsalWeight=weight)
        run = training_run(folder, type_, **settings, epochs=6, evaluation=0.25)
        result, code = run_in_process(folder, run)
        assert code == 0, result.message
        found[weight] = manifest_of(run).metrics
        assert found[weight]["rows"] < 24, "what is rehearsed is not counted"
    assert found[2.0]["rehearsalLoss"] < 0.95 * found[1e-6]["rehearsalLoss"]


def test_a_preference_stage_rehearses_alike_on_two_ranks(tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run = training_run(folder, "kto", **rehearsing(), maxSteps=4, tokensPerBatch=128, processes=processes)
        run_ranks(folder, run)
        found.append((manifest_of(run).metrics, load_file(next(output_folder(run).glob("*.safetensors")))))
    for name in ("loss", "rehearsalLoss"):
        assert found[0][0][name] == pytest.approx(found[1][0][name], rel=1e-5)
    gap = sum(float((tensor - found[1][1][name]).square().sum()) for name, tensor in found[0][1].items())
    assert math.sqrt(gap) < 1e-4


@given(
    own=st.integers(1, 60),
    shares=st.lists(st.floats(0.02, 0.3), min_size=1, max_size=3),
    least=st.integers(1, 3),
    more=st.integers(0, 5),
)
def test_every_step_has_enough_rows_of_its_own(own: int, shares: list[float], least: int, more: int) -> None:
    """What `least_mixed` promises, for the shares that whole rows come to."""
    counts = [max(1, round(own * share / (1 - sum(shares)))) for share in shares]
    whole = own + sum(counts)
    needed = least_mixed(least, [count / whole for count in counts])
    names = [f"own{n}" for n in range(own)]
    plan = plan_steps(
        names,
        seed=1,
        global_batch=needed + more,
        epochs=2,
        max_steps=None,
        rehearsal=[([f"{k}/{n}" for n in range(7)], share) for k, share in enumerate(shares)],
        least=needed,
    )
    if whole >= needed:
        assert min(len(plan.own_rows(step)) for step in range(plan.steps)) >= least


def test_a_step_too_small_for_its_own_rows_is_refused() -> None:
    fields = {"dataset": "a", "rehearsal": [{"dataset": "b", "share": 0.5}]}
    with pytest.raises(ValidationError, match=r"of training\.globalBatch: 4 too few .* Take at least 5"):
        Kto.model_validate({**fields, "training": {"globalBatch": 4}})
    assert Kto.model_validate({**fields, "training": {"globalBatch": 5}}).step_needs == 5


def test_a_weight_without_rows_is_refused() -> None:
    with pytest.raises(ValidationError, match="rehearsalWeight weighs the rows that rehearsal mixes in"):
        Dpo.model_validate({"dataset": "a", "rehearsalWeight": 2})


def test_shares_leave_room_for_the_own_rows() -> None:
    with pytest.raises(ValidationError, match=r"the shares sum to 1\.2 and leave no room for dataset"):
        Sft.model_validate(
            {"dataset": "a", "rehearsal": [{"dataset": "b", "share": 0.6}, {"dataset": "c", "share": 0.6}]}
        )
