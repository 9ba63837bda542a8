"""Stages that learn from their own answers: whole runs on a tiny model, killed and resumed, alone and together."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.online import ONLINE_STAGES
from plumbline_api.stagerun import StageRun
from plumbline_trainer.progress import ProgressReporter
from plumbline_trainer.storage.checkpoints import wait_for_uploads
from plumbline_trainer.worker import execute
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.trainer import manifest_of, output_folder, run_in_process, stage_context
from support.training_data import training_run

REWARDS = [
    {"rule": "keywords", "keywords": ["a", "e"], "normalize": True},
    {"rule": "length", "weight": -0.01},
]
EVERYTHING: dict[str, dict[str, Any]] = {
    "ppo": {
        "answers": 2,
        "updateEpochs": 2,
        "miniBatches": 2,
        "kl": {"coefficient": 0.1, "target": 1.0, "horizon": 50},
    },
    "grpo": {"answers": 3, "miniBatches": 2, "kl": {"coefficient": 0.1, "estimator": "k3"}, "entropyCoefficient": 0.01},
    "rloo": {"answers": 3, "updateEpochs": 2, "missingEndPenalty": 0.5},
    "reinforce": {"answers": 2, "baseline": "group", "scoreClip": 1.0},
}


def online_run(folder: Path, type_: str, **fields: Any) -> StageRun:
    stage = {"rewards": REWARDS, "rollout": {"maxNewTokens": 6}} | fields.pop("stage", {})
    fields = {
        "rows": 16,
        "lora": {"rank": 4},
        "globalBatch": 4,
        "maxLength": 64,
        "maxSteps": 3,
        "learningRate": 5e-3,
        **fields,
    }
    return training_run(folder, type_, stage=stage, **fields)


def weights_of(run: StageRun) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(output_folder(run).glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_bits(one: StageRun, other: StageRun) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("type_", ONLINE_STAGES)
@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "full"])
def test_a_stage_runs_and_tells_its_figures(tmp_path: Path, type_: str, lora: dict[str, Any] | None) -> None:
    run = online_run(tmp_path, type_, evaluation=0.2, lora=lora)
    result, code = run_in_process(tmp_path, run)
    assert code == 0, result.message
    manifest = manifest_of(run)
    assert manifest.kind == "policy"
    told = {"reward", "kl", "entropy", "length.mean", "reward.keywords", "clipFraction", "evalReward", "ratioAtStart"}
    assert told <= manifest.metrics.keys()
    assert manifest.metrics["ratioAtStart"] < 1e-5
    assert manifest.metrics["plainPath"] == 0
    critic = output_folder(run) / "critic"
    assert critic.is_dir() == (type_ == "ppo")
    if type_ == "ppo":
        assert load_file(critic / "head.safetensors")["weight"].abs().sum() > 0, "the head began at zero"
        assert (critic / ("adapter_model.safetensors" if lora else "model.safetensors")).is_file()


class Stopper:
    """Asks a stage to stop once it has told how far it is so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told, self.at = 0, -1
        self.context: Any = None
        real = ProgressReporter._update

        def counted(reporter: ProgressReporter, step: int, steps: int, message: str, metrics: Any) -> None:
            self.told += 1
            if self.told == self.at:
                self.context.stop.request()
            real(reporter, step, steps, message, metrics)

        monkeypatch.setattr(ProgressReporter, "_update", counted)

    def attempt(self, folder: Path, run: StageRun, at: int) -> tuple[Any, int]:
        self.told, self.at, self.context = 0, at, stage_context(folder, run)
        return execute(self.context)


class Killed(BaseException):
    """The process ends here, as far as the stage is concerned."""


@pytest.mark.parametrize("type_", ONLINE_STAGES)
def test_stopped_at_random_moments_and_resumed_it_ends_with_the_same_bits(
    tmp_path: Path, type_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "stage": EVERYTHING[type_],
        "evaluation": 0.2,
        "evaluateEverySteps": 2,
        "abort_when": [{"metric": "kl", "above": 1e9}],
        "maxSteps": 4,
    }
    stopper = Stopper(monkeypatch)
    whole = online_run(tmp_path / "whole", type_, **settings)
    result, code = stopper.attempt(tmp_path / "whole", whole, -1)
    assert code == 0, result.message
    moments, rng, steps = stopper.told, random.Random(type_), list[int]()
    broken = online_run(tmp_path / "broken", type_, **settings)
    for attempt in range(1, 30):
        here = tmp_path / "broken" if attempt == 1 else tmp_path / "broken" / f"attempt-{attempt}"
        # Later attempts have less left to tell of.
        result, code = stopper.attempt(here, broken, rng.randint(2, max(3, moments // 3)))
        if code == 0:
            break
        assert code == 143, result.message
        steps.append(result.last_step)
    assert code == 0
    assert len(steps) >= 2, "it was never stopped"
    assert any(0 < step < 4 for step in steps)
    assert manifest_of(broken).metrics.keys() == manifest_of(whole).metrics.keys()
    assert_same_bits(whole, broken)
    for name in ("reward", "kl", "evalReward", "entropy", "clipFraction"):
        assert manifest_of(broken).metrics[name] == manifest_of(whole).metrics[name], name


def test_killed_after_a_rollout_it_learns_from_the_stored_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process must find answers, scores and values in storage, and sample none for that iteration."""
    from plumbline_trainer.engine import online
    from plumbline_trainer.rollout.huggingface import HuggingFaceRollout

    settings: dict[str, Any] = {"stage": EVERYTHING["ppo"], "checkpointEverySteps": 2, "maxSteps": 3}
    whole = online_run(tmp_path / "whole", "ppo", **settings)
    assert run_in_process(tmp_path / "whole", whole)[1] == 0
    broken = online_run(tmp_path / "broken", "ppo", **settings)
    context = stage_context(tmp_path / "broken", broken)
    real = online.OnlineRun.learn

    def dies(run: online.OnlineRun, *arguments: Any) -> dict[str, float]:
        if run.state.step == 1:
            wait_for_uploads(context)
            raise Killed
        return real(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(online.OnlineRun, "learn", dies)
        with pytest.raises(Killed):
            execute(context)
    sampled: list[int] = []
    sample = HuggingFaceRollout.sample

    def counted(engine: HuggingFaceRollout, prompts: Any, **settings: Any) -> Any:
        sampled.append(len(prompts))
        return sample(engine, prompts, **settings)

    monkeypatch.setattr(HuggingFaceRollout, "sample", counted)
    result, code = run_in_process(tmp_path / "broken" / "again", broken)
    assert code == 0, result.message
    assert result.first_step == 1
    assert len(sampled) == 1, "the rollout of iteration 2 is in storage; only that of iteration 3 is sampled"
    assert_same_bits(whole, broken)


@pytest.mark.parametrize("type_", ONLINE_STAGES)
def test_two_ranks_learn_what_one_learns(tmp_path: Path, type_: str) -> None:
    settings: dict[str, Any] = {"stage": EVERYTHING[type_], "evaluation": 0.2, "tokensPerBatch": 256}
    alone = online_run(tmp_path / "alone", type_, **settings)
    assert run_in_process(tmp_path / "alone", alone)[1] == 0
    together = online_run(tmp_path / "together", type_, **settings, processes=2)
    run_ranks(tmp_path / "together", together)
    first, second = weights_of(alone), weights_of(together)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=2e-5)
    for name in ("reward", "kl", "evalReward", "entropy"):
        assert manifest_of(together).metrics[name] == pytest.approx(
            manifest_of(alone).metrics[name], rel=1e-4, abs=1e-5
        )


def test_micro_batches_do_not_matter(tmp_path: Path) -> None:
    wide = online_run(tmp_path / "wide", "grpo", stage=EVERYTHING["grpo"], tokensPerBatch=4096)
    narrow = online_run(tmp_path / "narrow", "grpo", stage=EVERYTHING["grpo"], tokensPerBatch=64)
    for folder, run in ((tmp_path / "wide", wide), (tmp_path / "narrow", narrow)):
        assert run_in_process(folder, run)[1] == 0
    first, second = weights_of(wide), weights_of(narrow)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=2e-5)


class TestAborting:
    SETTINGS: dict[str, Any] = {
        "stage": {"rewards": [{"rule": "keywords", "keywords": ["a"]}], "answers": 4},
        "epochs": 20,
        "maxSteps": 40,
        "learningRate": 3e-2,
        "schedule": {"type": "constant"},
    }

    def test_the_last_good_weights_are_the_output(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are those that sampled the last rollout before the rule's window began."""
        from plumbline_trainer.engine.online import OnlineRun

        seen: list[dict[str, torch.Tensor]] = []
        kl: list[float] = []
        observe = OnlineRun._observe

        def watched(run: OnlineRun, figures: Any, **settings: Any) -> None:
            if "kl" in figures and "reward" in figures and settings.get("speak_of_weights", True):
                seen.append(run.policy.copies())
                kl.append(figures["kl"])
            observe(run, figures, **settings)

        monkeypatch.setattr(OnlineRun, "_observe", watched)
        rule = {"metric": "kl", "above": 0.5, "for": 2}
        run = online_run(tmp_path, "reinforce", **self.SETTINGS, abort_when=[rule])
        result, code = run_in_process(tmp_path, run)
        assert code == 0, result.message
        metrics = manifest_of(run).metrics
        assert metrics["aborted"] == 1
        assert "kl above 0.5 for 2 steps" in result.message
        assert kl[-1] > 0.5
        assert kl[-2] > 0.5
        assert kl[-3] <= 0.5
        assert result.message.endswith(f"after iteration {len(kl) - 3}")
        assert manifest_of(run).aborted == result.message
        assert metrics["steps"] == len(kl) - 1, "nothing is learnt from the rollout that ends the stage"
        written = {name.replace("base_model.model.", ""): tensor for name, tensor in weights_of(run).items()}
        good = {name.replace(".default", ""): tensor for name, tensor in seen[-3].items()}
        assert written.keys() == good.keys()
        assert all(torch.equal(written[name], good[name]) for name in good)
