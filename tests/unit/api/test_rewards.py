"""Rewards in manifests: what is refused and where, what a record resolves, what enters a fingerprint, what pods get."""

from __future__ import annotations

from typing import Any

import pytest
from plumbline_api.check import check
from plumbline_api.errors import ManifestError
from plumbline_api.pipeline import AlignmentPipeline, Storage
from plumbline_api.record import RunRecord, fingerprints
from plumbline_api.resolve import resolve
from plumbline_api.runtime import AlignmentRuntime, RewardEndpoint
from plumbline_api.stagerun import endpoint_token_env
from support.pipelines import pipeline_body, runtime_body

PROMPTS = {"name": "asked", "source": "s3://corpus/asked.jsonl", "format": "prompt"}
ANSWERED = {"name": "asked", "source": "s3://corpus/asked.jsonl", "format": "promptCompletion"}
JUDGE: dict[str, Any] = {"name": "judge", "url": "https://judge.example/score"}


def body_with(*rewards: dict[str, Any], dataset: dict[str, Any] = ANSWERED, **spec: Any) -> dict[str, Any]:
    stage = {"name": "rl", "grpo": {"prompts": "asked", "rewards": list(rewards)}}
    return pipeline_body(datasets=[dataset], stages=[stage], **spec)


def runtime_with(*endpoints: dict[str, Any], **allow: Any) -> AlignmentRuntime:
    return AlignmentRuntime.parse(runtime_body(rewardEndpoints=list(endpoints), allow=allow))


def problems_of(body: dict[str, Any], runtime: AlignmentRuntime | None = None, **options: Any) -> list[str]:
    try:
        pipeline = AlignmentPipeline.parse(body)
    except ManifestError as error:
        return [str(problem) for problem in error.problems]
    return [str(problem) for problem in check(pipeline, runtime, **options)]


def record_of(body: dict[str, Any], runtime: AlignmentRuntime) -> RunRecord:
    return resolve(AlignmentPipeline.parse(body), runtime, operator_version="test", place="cluster")


def print_of(body: dict[str, Any], runtime: AlignmentRuntime, *last: str) -> str:
    record = record_of(body, runtime)
    pins = [character * 64 for character in "ab"] + list(last)
    assert len(pins) == len(record.external_inputs)
    return fingerprints(record, pins)["rl"]


@pytest.mark.parametrize(
    ("reward", "field"),
    [({"rule": "exactMatch"}, "rule"), ({"rule": "numericMatch"}, "rule"), ({"metric": "rougeL"}, "metric")],
)
@pytest.mark.parametrize("form", ["prompt", "unpaired"])
def test_rewards_that_compare_need_rows_with_answers(reward: dict[str, Any], field: str, form: str) -> None:
    (problem,) = problems_of(body_with({"rule": "length"}, reward, dataset={**PROMPTS, "format": form}))
    assert problem.startswith(f"spec.stages[0].grpo.rewards[1].{field}: {reward[field]} compares with the answer")
    assert '"asked" holds' in problem
    assert problems_of(body_with(reward)) == []
    assert problems_of(body_with(reward, dataset={**PROMPTS, "format": "auto"})) == []


def test_a_gold_reward_is_not_normalised() -> None:
    (problem,) = problems_of(body_with({"rule": "length"}, {"metric": "bleu", "gold": True, "normalize": True}))
    assert "a gold reward is watched as it is; leave normalize out" in problem


def test_functions_run_only_where_the_runtime_names_them() -> None:
    body = body_with({"function": "team.rewards:kind"})
    path = "spec.stages[0].grpo.rewards[0].function"
    refused = (
        f'{path}: runtime cpu does not allow the reward function "team.rewards:kind" in namespace team-a. Allowed: '
    )
    assert problems_of(body, runtime_with(), place="cluster") == [f"{refused}none"]
    assert problems_of(body, runtime_with(rewardFunctions=["team.rewards:other"]), place="cluster") == [
        f"{refused}team.rewards:other"
    ]
    assert problems_of(body, runtime_with(rewardFunctions=["team.rewards:kind"]), place="cluster") == []
    assert problems_of(body, place="local") == []


def test_endpoints_are_those_of_the_runtime() -> None:
    body = body_with({"endpoint": "judge"})
    path = "spec.stages[0].grpo.rewards[0].endpoint"
    assert problems_of(body, runtime_with(), place="cluster") == [
        f'{path}: runtime cpu does not allow the reward endpoint "judge" in namespace team-a. Allowed: none'
    ]
    assert problems_of(body, runtime_with(JUDGE), place="cluster") == []
    (problem,) = problems_of(body, place="local")
    assert problem.startswith(f'{path}: nothing says where "judge" is. For a local run put the AlignmentRuntime')
    known = [RewardEndpoint.model_validate(JUDGE)]
    assert problems_of(body, place="local", local_endpoints=known) == []


def test_classifiers_are_model_sources() -> None:
    runtime = runtime_with(modelSources=["s3://models"], claims=["shared"])
    assert problems_of(body_with({"model": "s3://models/rm"}), runtime, place="cluster") == []
    path = "spec.stages[0].grpo.rewards[0].model"
    (problem,) = problems_of(body_with({"model": "hf://org/rm"}), runtime, place="cluster")
    assert problem.startswith(f'{path}: runtime cpu does not allow the model source "hf://org/rm"')
    found = problems_of(body_with({"model": "pvc://private/rm"}), runtime, place="cluster")
    assert any(problem.startswith(f'{path}: runtime cpu does not allow the claim "private"') for problem in found)
    (problem,) = problems_of(body_with({"model": "org/rm"}), place="cluster")[:1]
    assert problem.startswith(f'{path}: "org/rm": models are read from')


def test_what_rewards_read_becomes_inputs_that_are_pinned() -> None:
    rewards = [
        {"model": "s3://models/rm"},
        {"function": "team.rewards:kind"},
        {"endpoint": "judge"},
        {"rule": "length"},
    ]
    runtime = runtime_with({**JUDGE, "version": "3", "secretName": "key"}, rewardFunctions=["team.rewards:kind"])
    record = record_of(body_with(*rewards), runtime)
    assert [(item.name, item.kind, item.uri, item.settings) for item in record.external_inputs[2:]] == [
        ("reward/rl/0", "classifier", "s3://models/rm", {}),
        ("function/team.rewards:kind", "function", "python:team.rewards:kind", {}),
        ("endpoint/judge", "endpoint", "https://judge.example/score", {"version": "3"}),
    ]
    roles = [ref.role for ref in record.stage("rl").inputs]
    assert roles[-3:] == ["rewards.0.model", "rewards.1.function", "rewards.2.endpoint"]
    (endpoint,) = record.endpoints_of("rl") or []
    assert (endpoint.name, endpoint.secret_name) == ("judge", "key")


def test_the_source_of_a_function_and_the_version_of_an_endpoint_are_part_of_the_work() -> None:
    body = body_with({"function": "team.rewards:kind"})
    runtime = runtime_with(rewardFunctions=["team.rewards:kind"])
    assert print_of(body, runtime, "c" * 64) == print_of(body, runtime, "c" * 64)
    assert print_of(body, runtime, "c" * 64) != print_of(body, runtime, "d" * 64)

    def asked(**fields: Any) -> str:
        return print_of(body_with({"endpoint": "judge"}), runtime_with({**JUDGE, **fields}), "c" * 64)

    assert asked(version="1") != asked(version="2")
    assert asked(version="1") == asked(version="1", timeout="5m", batchSize=8, url="https://elsewhere.example/")


def test_scores_of_an_endpoint_without_a_version_serve_their_own_pipeline_only() -> None:
    def run(uid: str, **fields: Any) -> tuple[bool, str]:
        body, runtime = body_with({"endpoint": "judge"}, uid=uid), runtime_with({**JUDGE, **fields})
        return record_of(body, runtime).stage("rl").cache, print_of(body, runtime, "c" * 64)

    assert run("u-1", version="1") == run("u-2", version="1")
    assert run("u-1")[0] is False
    assert run("u-1")[1] == run("u-1")[1]
    assert run("u-1")[1] != run("u-2")[1]


def test_a_local_run_knows_the_endpoints_that_it_is_given() -> None:
    pipeline = AlignmentPipeline.parse(body_with({"endpoint": "judge"}))
    record = resolve(
        pipeline,
        None,
        operator_version="test",
        place="local",
        local_storage=Storage(uri="file:///runs"),
        local_endpoints=[RewardEndpoint.model_validate(JUDGE)],
    )
    assert [endpoint.url for endpoint in record.endpoints_of("rl") or []] == [JUDGE["url"]]


def test_tokens_have_a_variable_each() -> None:
    assert endpoint_token_env("help-ful") == "PLUMBLINE_ENDPOINT_TOKEN_HELP_FUL"
