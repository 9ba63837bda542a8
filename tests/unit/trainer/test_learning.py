"""Reinforcement learning learns, and only what it is rewarded for: a task whose right answer depends on the prompt.

Eight answers are equally likely, so that the best constant one is right one time in eight; held-out prompts are none
of those trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plumbline_trainer.watch.verdict import MONITORS_FILE
from support.lookup_task import Learner, learning_run, taught
from support.trainer import manifest_of, output_folder, output_of, run_in_process

METHODS: dict[str, dict[str, Any]] = {
    "ppo": {"answers": 4, "updateEpochs": 2, "miniBatches": 2, "kl": {"coefficient": 0.001}},
    "grpo": {"answers": 8},
    "rloo": {"answers": 8, "miniBatches": 2, "kl": {"coefficient": 0.001}},
}
STEPS = {"ppo": 30, "grpo": 45, "rloo": 60}


@pytest.fixture(scope="module")
def learner(tmp_path_factory: pytest.TempPathFactory) -> Learner:
    return taught(tmp_path_factory.mktemp("learner"))


def metrics_of(learner: Learner, run: Any, name: str) -> dict[str, float]:
    result, code = run_in_process(learner.folder / name, run)
    assert code == 0, result.message
    return manifest_of(run).metrics


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_the_task_from_reward_alone(learner: Learner, method: str, seed: int) -> None:
    run = learning_run(learner, method, seed=seed, fields=METHODS[method], steps=STEPS[method])
    metrics = metrics_of(learner, run, f"{method}-{seed}")
    assert metrics["evalRewardStart"] < 0.2
    assert metrics["evalReward"] > 0.8
    if seed == 1:
        # What it says depends on the prompt: against the answers of other prompts it is as good as a guess.
        other = learning_run(
            learner, method, seed=9, fields=METHODS[method], steps=1, answers="shuffled", learningRate=1e-9
        )
        inputs = [output_of(run), *other.inputs[1:]]
        other = other.model_copy(update={"inputs": inputs, "fingerprint": f"{len(method):064x}"})
        assert metrics_of(learner, other, f"{method}-shuffled")["evalRewardStart"] < 0.2


def test_without_reward_it_learns_nothing(learner: Learner) -> None:
    rewards = [{"rule": "matches", "pattern": "never said"}, {"rule": "exactMatch", "gold": True}]
    run = learning_run(learner, "grpo", seed=1, rewards=rewards, fields=METHODS["grpo"], steps=20)
    metrics = metrics_of(learner, run, "nothing")
    assert metrics["reward"] == 0
    assert metrics["goldReward"] < 0.2


class TestHacking:
    """Longer is better, says the reward; the gold one wants the right answer, which is short."""

    REWARDS = [{"rule": "length", "weight": 0.1}, {"rule": "exactMatch", "gold": True}]
    FIELDS = {**METHODS["grpo"], "rollout": {"maxNewTokens": 12}}

    def test_the_monitors_see_it(self, learner: Learner) -> None:
        run = learning_run(learner, "grpo", seed=1, rewards=self.REWARDS, fields=self.FIELDS, steps=20)
        metrics = metrics_of(learner, run, "hacked")
        assert metrics["reward"] > 2 * metrics["rewardStart"]
        found = json.loads((output_folder(run) / MONITORS_FILE).read_text())
        assert found["verdict"] == "hacked"
        assert {"verbosity"} <= {sign["monitor"] for sign in found["signs"]}
        assert "the reward is probably being hacked" in found["text"]

    def test_a_rule_stops_it(self, learner: Learner) -> None:
        rule = {"metric": "length.growth", "above": 1.5, "for": 2}
        run = learning_run(
            learner, "grpo", seed=1, rewards=self.REWARDS, fields=self.FIELDS, steps=40, abort_when=[rule]
        )
        result, code = run_in_process(learner.folder / "stopped", run)
        assert code == 0, result.message
        metrics = manifest_of(run).metrics
        assert metrics["aborted"] == 1
        assert metrics["steps"] < 40
        assert "length.growth above 1.5 for 2 steps" in result.message
        found = json.loads((output_folder(run) / MONITORS_FILE).read_text())
        assert "length.growth above 1.5" in found["aborted"]


def test_the_task_is_what_it_is_said_to_be(tmp_path: Path) -> None:
    from support.lookup_task import rows

    found = rows(4000, seed=5)
    counts = [sum(row["completion"] == digit for row in found) for digit in "01234567"]
    assert max(counts) / len(found) < 0.2
    assert sum(counts) == len(found)
