"""What a typo, a wrong type or a place that does not fit gets."""

from __future__ import annotations

from typing import Any

import pytest
from plumbline_api.runtime import AlignmentRuntime
from support.pipelines import (
    DATASETS,
    pipeline_body,
    problems_with,
    runtime_body,
    stages_with,
)


def test_a_full_pipeline_fits() -> None:
    assert problems_with(pipeline_body(), runtime_body(), "cluster") == []


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown field": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "bta": 0.1})},
        ["spec.stages[2].dpo.bta: unknown field. Did you mean beta?"],
    ),
    "unknown nested field": (
        {"stages": stages_with(1, sft={"dataset": "tickets", "training": {"learningRte": 1e-4}})},
        ["spec.stages[1].sft.training.learningRte: unknown field. Did you mean learningRate?"],
    ),
    "field of the one within": (
        {"stages": stages_with(1, sft={"dataset": "tickets", "learningRate": 1e-4})},
        ["spec.stages[1].sft.learningRate: unknown field. It belongs into training"],
    ),
    "field of the one above": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "retries": 2})},
        ["spec.stages[2].dpo.retries: unknown field. It belongs beside dpo, one level up"],
    ),
    "unknown stage type": (
        {"stages": [{"name": "s", "dop": {"dataset": "prefs"}}]},
        [
            "spec.stages[0].dop: unknown field. Did you mean dpo?",
        ],
    ),
    "two stage types": (
        {"stages": stages_with(0, sft={"dataset": "tickets"})},
        [
            "spec.stages[0]: exactly one stage type must be set, pretrain and sft are; choose one of: pretrain, sft, rewardModel, dpo, kto, orpo, simpo, cpo, rrhf, awr, bestOfN, ppo, grpo, rloo, reinforce, merge, evaluate"
        ],
    ),
    "built-in name": (
        {"stages": stages_with(2, name="preflight")},
        ['spec.stages[2].name: "preflight" is the name of a built-in step; choose another'],
    ),
    "text for a number": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "beta": "0.1"})},
        ['spec.stages[2].dpo.beta: this is the text "0.1"; a number is needed, without quotes'],
    ),
    "a switch for a number": (
        {"stages": stages_with(1, retries=True)},
        ["spec.stages[1].retries: this is true; a whole number is needed"],
    ),
    "a number for a duration": (
        {"stages": stages_with(1, timeout=300)},
        ["spec.stages[1].timeout: this is the number 300; write a duration such as 90s, 30m or 1h30m"],
    ),
    "a fraction for a whole number": (
        {"stages": stages_with(1, retries=1.5)},
        ["spec.stages[1].retries: 1.5 is no whole number"],
    ),
    "a whole number written as a fraction": ({"stages": stages_with(1, retries=2.0)}, []),
    "a number that is none": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "beta": float("nan")})},
        ["spec.stages[2].dpo.beta: nan is no finite number"],
    ),
    "a mapping for a list": ({"stages": {}}, ["spec.stages: this is a mapping; a list is needed"]),
    "no stages": ({"stages": []}, ["spec.stages: the list must not be empty"]),
    "a type without its settings": (
        {"stages": stages_with(3, merge=None)},
        ["spec.stages[3].merge: nothing is set below it; leave the field out, or write {} for its defaults"],
    ),
    "an adapter without its settings": (
        {"stages": stages_with(1, sft={"dataset": "tickets", "lora": None})},
        ["spec.stages[1].sft.lora: nothing is set below it; leave the field out, or write {} for its defaults"],
    ),
    "a quantity that is none": (
        {"stages": stages_with(1, resources={"memory": "lots"})},
        ['spec.stages[1].resources.memory: "lots" must be a quantity such as 500m, 4 or 16Gi'],
    ),
    "a fraction as a quantity": (
        {"stages": stages_with(1, resources={"cpu": 0.5, "memory": 4})},
        ['spec.stages[1].resources.cpu: this is the number 0.5; write it as text: "0.5"'],
    ),
    "a name that is none": (
        {"stages": stages_with(1, name="Größe")},
        [
            'spec.stages[1].name: "Größe" must be small letters, digits and dashes, with a letter first and no dash at '
            "the end"
        ],
    ),
    "a column that the format does not have": (
        {"datasets": [DATASETS[0], DATASETS[1], {**DATASETS[2], "columns": {"choosen": "a", "question": "b"}}]},
        [
            'spec.datasets[2].columns.choosen: format preference has no field "choosen". Did you mean chosen?',
            'spec.datasets[2].columns.question: format preference has no field "question". Its fields: chosen, rejected, '
            "prompt, margin, weight",
        ],
    ),
    "a folder without its scheme": (
        {"model": {"source": "model"}},
        [
            'spec.model.source: "model": models are read from hf://, s3://, pvc://, bundled://, file://. For a folder of '
            "this machine write file://model"
        ],
    ),
    "hub shorthand": (
        {"model": {"source": "org/name"}},
        [
            'spec.model.source: "org/name": models are read from hf://, s3://, pvc://, bundled://, file://. For a folder of this machine write file://org/name, for a hub model hf://org/name'
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_problems_name_field_value_and_remedy(case: str) -> None:
    changes, expected = CASES[case]
    assert problems_with(pipeline_body(**changes)) == expected


def test_long_name_is_refused_with_its_length() -> None:
    (problem,) = problems_with(pipeline_body(name="a" * 64))
    assert problem.startswith("metadata.name:")
    assert "64 characters; at most 40" in problem


def test_local_files_are_refused_on_a_cluster_only() -> None:
    body = pipeline_body(model={"source": "file:///models/m"})
    assert problems_with(body, place="local") == []
    (problem,) = problems_with(body, runtime_body(), "cluster")
    assert problem.startswith("spec.model.source:")
    assert "plumbline run" in problem


def test_runtime_limits_and_allow_lists() -> None:
    runtime = runtime_body(
        allow={"namespaces": ["team-b"], "storagePrefixes": ["s3://alignment/{namespace}"], "secretNames": ["other"]},
        limits={"nodes": 1, "memory": "8Gi"},
    )
    body = pipeline_body(
        stages=stages_with(1, resources={"nodes": 2, "memory": "16Gi"}),
        storage={"uri": "s3://alignment/team-ab", "secretName": "s3-credentials"},
    )
    found = problems_with(body, runtime, "cluster")
    assert [p.split(":")[0] for p in found] == [
        "spec.runtimeRef",
        "spec.storage.uri",
        "spec.storage.secretName",
        "spec.stages[1].resources.nodes",
        "spec.stages[1].resources.memory",
    ]


@pytest.mark.parametrize("uri", ["s3://alignment/team-a/../team-b", "s3://alignment/team-ab", "s3://other/team-a"])
def test_a_prefix_ends_at_a_path_boundary(uri: str) -> None:
    runtime = AlignmentRuntime.parse(runtime_body())
    assert not runtime.allows(["s3://alignment/{namespace}"], uri, "team-a")
    assert runtime.allows(["s3://alignment/{namespace}"], "s3://alignment/team-a/x", "team-a")
