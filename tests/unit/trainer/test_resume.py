"""Exact resume: a stage that is killed and started again ends with the same bits as one that was not.

In this process at every kind of moment, and through the launcher with SIGKILL and SIGTERM, one process and two.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from plumbline_api.stagerun import StageRun
from plumbline_trainer.context import StageContext
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.reference_cache import ReferenceCache
from plumbline_trainer.errors import Interrupted
from plumbline_trainer.stages import awr, dpo, kto, orpo, pretrain, reward_model, sft
from plumbline_trainer.storage.checkpoints import wait_for_uploads
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.trainer import finish_launcher, launch, manifest_of, output_folder, stage_context, start_launcher
from support.training_data import training_run

STAGES = {
    "awr": awr,
    "dpo": dpo,
    "kto": kto,
    "orpo": orpo,
    "pretrain": pretrain,
    "rewardModel": reward_model,
    "sft": sft,
}
LORA = {"rank": 4, "dropout": 0.1}
EVERYTHING = {
    "rank": 4,
    "dropout": 0.1,
    "rsLora": True,
    "dora": True,
    "modulesToSave": ["embed_tokens", "lm_head", "norm"],
}


SAMPLING = {
    "rewards": [{"rule": "keywords", "keywords": ["a", "e"], "normalize": True}],
    "rollout": {"maxNewTokens": 6},
    "answers": 2,
    "updateEpochs": 2,
    "miniBatches": 2,
    "kl": {"coefficient": 0.1, "target": 1.0, "horizon": 100},
}


def digest_of(folder: Path) -> str:
    state = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        state.update(path.read_bytes())
    return state.hexdigest()


class Killed(BaseException):
    """The process ends here, as far as the stage is concerned."""


class TestInProcess:
    def attempt(
        self, folder: Path, run: StageRun, monkeypatch: pytest.MonkeyPatch, *, die_at: int = -1, stop_at: int = -1
    ) -> tuple[StageContext, Any, list[int]]:
        """One attempt; it dies (or is asked to stop) once so many steps are done."""
        context = stage_context(folder, run)
        steps: list[int] = []
        real = TrainingRun._take_step

        def counted(training: TrainingRun, objective: Any) -> None:
            if training.state.step == die_at:
                wait_for_uploads(context)
                raise Killed
            real(training, objective)
            steps.append(training.state.step)
            if training.state.step == stop_at:
                context.stop.request()

        with monkeypatch.context() as patch:
            patch.setattr(TrainingRun, "_take_step", counted)
            try:
                output = STAGES[run.type].run(context)
            except (Killed, Interrupted) as error:
                return context, error, steps
        return context, output, steps

    @pytest.mark.parametrize(
        ("type_", "lora", "every"),
        [
            ("sft", LORA, 2),
            ("sft", None, 3),
            ("dpo", {"rank": 4}, 2),
            ("pretrain", LORA, 5),
            ("dpo", None, 4),
            ("kto", {"rank": 4}, 3),
            ("rewardModel", {"rank": 4}, 2),
            ("rewardModel", None, 3),
            ("orpo", {"rank": 4}, 2),
            ("awr", {"rank": 4}, 4),
            ("awr", None, 3),
            ("sft", EVERYTHING, 2),
            ("dpo", EVERYTHING | {"dropout": 0.0}, 4),
        ],
    )
    def test_killed_at_any_step(
        self, tmp_path: Path, type_: str, lora: Any, every: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings: dict[str, Any] = {
            "lora": lora,
            "evaluation": 0.2,
            "globalBatch": 5,
            "epochs": 3,
            "learningRate": 3e-3,
            "schedule": {"type": "cosine", "warmupRatio": 0.2},
            "weightDecay": 0.1,
            "checkpointEverySteps": every,
            "evaluateEverySteps": 4,
            "tokensPerBatch": 96,
        }
        whole_run = training_run(tmp_path / "whole", type_, **settings)
        _, whole, steps = self.attempt(tmp_path / "whole", whole_run, monkeypatch)
        total = len(steps)
        assert total >= 9
        rng = random.Random(total)
        deaths = sorted(rng.sample(range(every, total), 2))

        folder = tmp_path / "killed"
        run = training_run(folder, type_, **settings)
        taken = 0
        for number, death in enumerate(deaths):
            _, ended, steps = self.attempt(folder / f"attempt-{number}", run, monkeypatch, die_at=death)
            assert isinstance(ended, Killed)
            taken += len(steps)
        _, output, steps = self.attempt(folder / "last", run, monkeypatch)
        taken += len(steps)
        assert 0 < output.first_step < output.last_step == total
        assert total <= taken < 2 * total
        assert digest_of(output.folder) == digest_of(whole.folder)
        timing = {"tokensPerSecond"}
        assert {k: v for k, v in output.metrics.items() if k not in timing} == {
            k: v for k, v in whole.metrics.items() if k not in timing
        }

    def test_stopped_on_request(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The checkpoint of the very step at which the stop was seen is committed before the stage ends."""
        settings: dict[str, Any] = {"lora": LORA, "globalBatch": 4, "epochs": 2, "checkpointEverySteps": 100}
        whole_run = training_run(tmp_path / "whole", "sft", **settings)
        _, whole, _ = self.attempt(tmp_path / "whole", whole_run, monkeypatch)
        run = training_run(tmp_path / "stopped", "sft", **settings)
        _, ended, _ = self.attempt(tmp_path / "stopped" / "one", run, monkeypatch, stop_at=5)
        assert isinstance(ended, Interrupted)
        assert ended.step == 5
        _, output, steps = self.attempt(tmp_path / "stopped" / "two", run, monkeypatch)
        assert output.first_step == 5
        assert steps[0] == 6
        assert digest_of(output.folder) == digest_of(whole.folder)

    def test_stopped_before_the_first_step(self, tmp_path: Path) -> None:
        run = training_run(tmp_path, "dpo", lora={"rank": 4}, globalBatch=4)
        context = stage_context(tmp_path, run)
        context.stop.request()
        with pytest.raises(Interrupted) as caught:
            dpo.run(context)
        assert caught.value.step == 0

    def test_stopped_during_the_last_evaluation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """All steps are done but the evaluation is not: the next attempt takes no step and evaluates."""
        settings: dict[str, Any] = {"lora": LORA, "evaluation": 0.3, "globalBatch": 4, "maxSteps": 4, "epochs": 9}
        whole_run = training_run(tmp_path / "whole", "sft", **settings)
        _, whole, _ = self.attempt(tmp_path / "whole", whole_run, monkeypatch)
        run = training_run(tmp_path / "stopped", "sft", **settings)
        _, ended, _ = self.attempt(tmp_path / "stopped" / "one", run, monkeypatch, stop_at=4)
        assert isinstance(ended, Interrupted)
        _, output, steps = self.attempt(tmp_path / "stopped" / "two", run, monkeypatch)
        assert steps == []
        assert output.metrics["evalLoss"] == whole.metrics["evalLoss"]
        assert output.metrics["evalLossStart"] == whole.metrics["evalLossStart"]
        assert digest_of(output.folder) == digest_of(whole.folder)

    @pytest.mark.parametrize("type_", ["dpo", "kto"])
    def test_resumes_with_the_same_references_when_they_are_lost(
        self, tmp_path: Path, type_: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All weights are trained, so the reference is the model before the checkpoint is taken up."""
        settings: dict[str, Any] = {"lora": None, "globalBatch": 4, "epochs": 2, "checkpointEverySteps": 2}
        whole_run = training_run(tmp_path / "whole", type_, learningRate=1e-3, **settings)
        _, whole, _ = self.attempt(tmp_path / "whole", whole_run, monkeypatch)
        run = training_run(tmp_path / "killed", type_, learningRate=1e-3, **settings)
        context, ended, _ = self.attempt(tmp_path / "killed" / "one", run, monkeypatch, die_at=7)
        assert isinstance(ended, Killed)
        for root in (context.run_root, context.namespace_root):
            kept = Path(root.removeprefix("file://")) / "references"
            assert list(kept.rglob("*.safetensors"))
            shutil.rmtree(kept)
        _, output, _ = self.attempt(tmp_path / "killed" / "two", run, monkeypatch)
        assert output.first_step == 6
        assert digest_of(output.folder) == digest_of(whole.folder)

    def test_resumes_with_the_references_it_began_with(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Others may add values for the same rows that round differently: a run keeps its own."""
        settings: dict[str, Any] = {"lora": {"rank": 4}, "globalBatch": 4, "epochs": 2, "checkpointEverySteps": 2}
        whole_run = training_run(tmp_path / "whole", "dpo", learningRate=1e-3, **settings)
        _, whole, _ = self.attempt(tmp_path / "whole", whole_run, monkeypatch)
        run = training_run(tmp_path / "killed", "dpo", learningRate=1e-3, **settings)
        context, ended, _ = self.attempt(tmp_path / "killed" / "one", run, monkeypatch, die_at=7)
        assert isinstance(ended, Killed)
        shared = Path(context.namespace_root.removeprefix("file://")) / "references"
        [file] = shared.rglob("*.safetensors")
        tensors = load_file(file)
        other = ReferenceCache.__new__(ReferenceCache)
        other._context = context
        shutil.rmtree(file.parent)
        raw = tensors["keys"].numpy().tobytes()
        shifted = {raw[32 * i : 32 * i + 32]: total + 1e-3 for i, total in enumerate(tensors["totals"])}
        other._write(f"file://{file.parents[1]}", shifted)
        _, output, _ = self.attempt(tmp_path / "killed" / "two", run, monkeypatch)
        assert output.first_step == 6
        assert digest_of(output.folder) == digest_of(whole.folder)


def newest_checkpoint(run: StageRun, folder: Path) -> int:
    """Step of the newest committed checkpoint; 0 where there is none."""
    root = Path(stage_context(folder / "look", run).run_root.removeprefix("file://")) / "checkpoints"
    found = [int(path.parent.name[:8]) for path in root.glob("*/manifest.json")]
    return max(found, default=0)


def wait_for_checkpoint(process: subprocess.Popen[str], run: StageRun, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 600
    while newest_checkpoint(run, folder) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"no checkpoint of step {step}:\n{process.communicate()[0]}")
        time.sleep(0.02)  # between two looks at a condition with a deadline


def last_step_said(output: str) -> int:
    return max(
        (int(found) for found in re.findall(r"(?:step|iteration) (\d+)/\d+  (?:loss|reward)", output)), default=0
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("processes", "type_"), [(1, "sft"), (2, "dpo"), (1, "ppo")])
def test_through_the_launcher(tmp_path: Path, processes: int, type_: str) -> None:
    """Killed, then stopped, then left alone: three attempts end with the bits of one."""
    settings: dict[str, Any] = {
        "lora": {"rank": 4},
        "evaluation": 0.1,
        "rows": 120,
        "globalBatch": 8,
        # Steps of two ranks take longer: fewer leave as much time to interrupt them.
        "epochs": 5 if processes == 1 else 3,
        "learningRate": 1e-3,
        "checkpointEverySteps": 3,
        "processes": processes,
    }
    if type_ == "ppo":
        settings |= {"stage": SAMPLING, "epochs": 20, "maxSteps": 50, "maxLength": 64}
    whole_run = training_run(tmp_path / "whole", type_, **settings)
    total = run_ranks(tmp_path / "whole", whole_run).last_step
    assert total is not None
    assert total >= 40

    rng = random.Random()
    killed_after, stopped_after = rng.randint(3, 12), rng.randint(15, 24)
    print(f"killed after step {killed_after}, stopped after step {stopped_after}")
    folder = tmp_path / "killed"
    first = training_run(folder, type_, attempt=1, **settings)
    process = start_launcher(first, folder / "tmp-1")
    wait_for_checkpoint(process, first, folder, killed_after)
    os.killpg(process.pid, signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert last_step_said(output) < total, "it was over before it could be killed"

    second = training_run(folder, type_, attempt=2, **settings)
    process = start_launcher(second, folder / "tmp-2")
    wait_for_checkpoint(process, second, folder, stopped_after)
    process.send_signal(signal.SIGTERM)
    stopped = finish_launcher(process, folder / "tmp-2")
    assert stopped.exit_code == 143, stopped.output
    assert stopped.result.outcome == "Stopped"

    third = training_run(folder, type_, attempt=3, **settings)
    ended = launch(third, folder / "tmp-3")
    assert ended.exit_code == 0, ended.output
    assert "resuming from step" in ended.output
    assert ended.result.first_step is not None
    assert 0 < ended.result.first_step < total == ended.result.last_step
    resumed_at = int(re.findall(r"resuming from step (\d+)", stopped.output)[0])
    assert resumed_at > 0
    # What the killed attempt said last may have died with the launcher, but its checkpoint tells.
    first_steps = max(last_step_said(output), resumed_at)
    second_steps = ended.result.first_step - resumed_at
    assert second_steps > 0
    assert total <= first_steps + second_steps + total - ended.result.first_step < 2 * total
    assert digest_of(output_folder(third)) == digest_of(output_folder(whole_run))
    held_out = "evalReward" if type_ == "ppo" else "evalLoss"
    for name in ("loss", held_out, f"{held_out}Start", "gradientNorm", "tokens"):
        assert manifest_of(third).metrics[name] == manifest_of(whole_run).metrics[name]
