"""Stages that learn from sampled answers on the real node: the bits of a local run, also when a pod goes away meanwhile."""

from pathlib import Path
from typing import Any

import pytest
from support.reference import run_beside, weights_of
from support.tenant import Tenant, stage_status
from support.tinypipeline import Manifest, tiny_manifest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

ITERATIONS = 40
TRAINING: dict[str, Any] = {"globalBatch": 4, "maxLength": 128, "epochs": 99, "learningRate": 1e-3}
REWARD = {
    "name": "reward",
    "model": "sft",
    "rewardModel": {"dataset": "preferences", "lora": {"rank": 4}, "training": {**TRAINING, "maxSteps": 4}},
}
RLHF = {
    "name": "rlhf",
    "model": "sft",
    "ppo": {
        "prompts": "questions",
        "rewards": [{"stage": "reward"}, {"name": "brief", "rule": "length", "gold": True}],
        "critic": {"start": "reward"},
        "answers": 2,
        "updateEpochs": 2,
        "rollout": {"maxNewTokens": 8},
        "lora": {"rank": 4},
        "training": {**TRAINING, "maxSteps": ITERATIONS, "checkpointEverySteps": 1},
    },
}
HACKED = {
    "name": "hacked",
    "model": "sft",
    "grpo": {
        "prompts": "questions",
        "rewards": [{"rule": "length"}],
        "answers": 4,
        "rollout": {"maxNewTokens": 8},
        "lora": {"rank": 4},
        "training": {**TRAINING, "maxSteps": ITERATIONS},
    },
    # From the first answer on: the rule is what is tried here, not the reward.
    "abortWhen": [{"metric": "length.mean", "above": 0.5, "for": 2}],
    "onAbort": "continue",
}


def sampling_manifest(name: str, source: str, **spec: Any) -> Manifest:
    """sft, a reward model, ppo by it, and a grpo that a rule ends."""
    manifest = tiny_manifest(name, source, stages=("sft",), **spec)
    datasets = tiny_manifest(name, source, stages=("sft", "dpo"))["spec"]["datasets"]
    questions = next(dataset for dataset in datasets if dataset["name"] == "questions")
    questions["split"] = {"evaluation": 0.25}
    manifest["spec"]["datasets"] = datasets
    manifest["spec"]["stages"] += [REWARD, RLHF, HACKED]
    return manifest


def test_ppo_whose_pod_is_deleted_ends_with_the_bits_of_a_local_run(
    tenant: Tenant, tiny_inputs: Path, tmp_path: Path
) -> None:
    with run_beside(tmp_path, sampling_manifest("sampling", tiny_inputs.as_uri())) as local:
        run = tenant.run(sampling_manifest("sampling", tenant.prefix, storage=tenant.storage))
        run.until("two iterations are committed", lambda _: max(run.checkpoints("rlhf"), default=0) >= 2)
        [pod] = [pod for pod in run.pods("rlhf") if pod["status"]["phase"] == "Running"]
        run.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false", "--grace-period=40")
        status = run.until_succeeded()

        first, *_, last = run.results("rlhf")
        assert (first["outcome"], last["outcome"]) == ("Stopped", "Succeeded")
        assert 0 < last["firstStep"] < ITERATIONS == last["lastStep"]
        for name in ("sft", "reward", "rlhf", "hacked"):
            assert stage_status(status, name)["fingerprint"] == local.fingerprint(name)
            assert weights_of(run.output(name)) == weights_of(local.output(name)), name
        assert any(path.startswith("critic/") for path in weights_of(run.output("rlhf")))

    figures = {item["name"]: float(item["value"]) for item in stage_status(status, "rlhf")["metrics"]}
    assert figures["steps"] == ITERATIONS
    assert {"evalReward", "evalRewardStart", "goldReward", "goldRewardStart"} <= set(figures)
    hacked = stage_status(status, "hacked")
    assert (hacked["phase"], hacked["reason"]) == ("Succeeded", "Aborted")
    assert hacked["message"].startswith("length.mean above 0.5 for 2 steps")
    assert {item["name"]: float(item["value"]) for item in hacked["metrics"]}["aborted"] == 1.0
    page = tenant.read(run.report_files()["report.html"]).decode()
    assert "Reward over KL" in page
