"""What a typo, a wrong type or a wrong reference gets."""

from __future__ import annotations

from typing import Any

import pytest
from plumbline_api.check import check
from plumbline_api.errors import ManifestError
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.runtime import AlignmentRuntime
from support.pipelines import DATASETS, STAGES, pipeline_body, runtime_body


def problems_with(body: dict[str, Any], runtime: dict[str, Any] | None = None, place: str = "anywhere") -> list[str]:
    try:
        pipeline = AlignmentPipeline.parse(body)
    except ManifestError as error:
        return [str(p) for p in error.problems]
    offered = None if runtime is None else AlignmentRuntime.parse(runtime)
    return [str(p) for p in check(pipeline, offered, place=place)]  # type: ignore[arg-type]


def stages_with(index: int, **changes: Any) -> list[dict[str, Any]]:
    stages = [dict(stage) for stage in STAGES]
    stages[index] = {**stages[index], **changes}
    return stages


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
    "unknown stage type": (
        {"stages": [{"name": "s", "dop": {"dataset": "prefs"}}]},
        [
            "spec.stages[0].dop: unknown field. Did you mean dpo?",
        ],
    ),
    "two stage types": (
        {"stages": stages_with(0, sft={"dataset": "tickets"})},
        [
            "spec.stages[0]: exactly one stage type must be set, pretrain and sft are; choose one of: pretrain, sft, dpo, orpo, simpo, cpo, rrhf, merge, evaluate"
        ],
    ),
    "wrong dataset format": (
        {"stages": stages_with(2, dpo={"dataset": "tickets"})},
        [
            'spec.stages[2].dpo.dataset: "tickets" holds instruction rows (instruction, input, output); dpo needs preference rows '
            "(prompt, chosen, rejected). Datasets that fit: prefs"
        ],
    ),
    "missing dataset": (
        {"stages": stages_with(2, dpo={"dataset": "pref"})},
        ['spec.stages[2].dpo.dataset: there is no dataset "pref". Did you mean prefs?'],
    ),
    "a stage as a dataset": (
        {"stages": stages_with(2, dpo={"dataset": "sft"})},
        ['spec.stages[2].dpo.dataset: "sft" is a stage; a dataset is needed here. Datasets: manuals, tickets, prefs'],
    ),
    "a report as a policy": (
        {"stages": [*STAGES, {"name": "again", "model": "exam", "merge": {}}]},
        [
            'spec.stages[5].model: "exam" (evaluate) yields a report; a policy is needed here. Stages that fit: domain, sft, dpo, final'
        ],
    ),
    "cycle": (
        {"stages": stages_with(0, model="dpo")},
        ["spec.stages[0]: the stages form a cycle: domain → dpo → sft → domain"],
    ),
    "two stages of one name": (
        {"stages": stages_with(2, name="sft")},
        ['spec.stages[2].name: "sft" is taken by spec.stages[1]; stages and datasets share one name space'],
    ),
    "built-in name": (
        {"stages": stages_with(2, name="preflight")},
        ['spec.stages[2].name: "preflight" is the name of a built-in step; choose another'],
    ),
    "no test split": (
        {"datasets": [DATASETS[0], {**DATASETS[1], "split": {}}, DATASETS[2]]},
        [
            'spec.stages[4].evaluate.suites[0].perplexity.dataset: "tickets" has no test split. Set spec.datasets[1].split.test '
            "(such as 0.1), or spec.datasets[1].role to test if no stage trains on it"
        ],
    ),
    "negative beta": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "beta": 0})},
        ["spec.stages[2].dpo.beta: 0: input should be greater than 0"],
    ),
    **{
        f"{stage} with beta 0": (
            {"stages": stages_with(2, dpo=None, **{stage: {"dataset": "prefs", "beta": 0}})},
            [f"spec.stages[2].{stage}.beta: 0: input should be greater than 0"],
        )
        for stage in ("orpo", "simpo", "cpo")
    },
    "negative margin": (
        {"stages": stages_with(2, dpo=None, simpo={"dataset": "prefs", "gamma": -1})},
        ["spec.stages[2].simpo.gamma: -1: input should be greater than or equal to 0"],
    ),
    "rrhf on instruction rows": (
        {"stages": stages_with(2, dpo=None, rrhf={"dataset": "tickets"})},
        [
            'spec.stages[2].rrhf.dataset: "tickets" holds instruction rows (instruction, input, output); rrhf needs preference '
            "rows (prompt, chosen, rejected). Datasets that fit: prefs"
        ],
    ),
    "unknown loss": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "ipo_sum"})},
        [
            'spec.stages[2].dpo.loss: "ipo_sum" is not one of sigmoid, robust, ipo, ipoSum, hinge, exo, nca, apoZero, apoDown. '
            "Did you mean ipoSum?"
        ],
    ),
    "label smoothing of a loss without": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "hinge", "labelSmoothing": 0.1})},
        [
            "spec.stages[2].dpo.labelSmoothing: 0.1 with loss hinge, which has no label smoothing; leave it out, or take loss "
            "exo, robust, sigmoid"
        ],
    ),
    "robust without label smoothing": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "robust"})},
        [
            "spec.stages[2].dpo: loss robust needs labelSmoothing, the share of pairs believed to be swapped, such as 0.1"
        ],
    ),
    "robust with half of the labels swapped": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "robust", "labelSmoothing": 0.5})},
        ["spec.stages[2].dpo.labelSmoothing: 0.5: input should be less than 0.5"],
    ),
    "exo without label smoothing": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "exo", "labelSmoothing": 0})},
        ["spec.stages[2].dpo.labelSmoothing: 0 with loss exo, which needs a share above 0; leave it out for 0.001"],
    ),
    "means of means": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "ipo", "lengthNormalized": True})},
        [
            "spec.stages[2].dpo.lengthNormalized: true with loss ipo, which takes means over tokens by itself; leave it out"
        ],
    ),
    "means of sums": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "ipoSum", "lengthNormalized": True})},
        [
            "spec.stages[2].dpo.lengthNormalized: true with loss ipoSum, which takes sums; leave it out, or take loss ipo for means"
        ],
    ),
    "gate without bound": (
        {"stages": stages_with(4, gates=[{"metric": "perplexity"}])},
        ["spec.stages[4].gates[0]: a gate needs atLeast, atMost or both"],
    ),
    "hub shorthand": (
        {"model": {"source": "org/name"}},
        [
            'spec.model.source: "org/name": models are read from hf://, s3://, pvc://, bundled://, file://. For a hub model write hf://org/name'
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
