"""Builders of manifests for tests."""

from __future__ import annotations

import copy
from typing import Any

from plumbline_api.check import check
from plumbline_api.errors import ManifestError
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.runtime import AlignmentRuntime

DATASETS: list[dict[str, Any]] = [
    {"name": "manuals", "source": "s3://corpus/manuals.txt", "format": "text", "split": {"test": 0.1}},
    {"name": "tickets", "source": "s3://corpus/tickets.jsonl", "format": "instruction", "split": {"test": 0.1}},
    {
        "name": "prefs",
        "source": "s3://corpus/prefs.jsonl",
        "format": "preference",
        "split": {"evaluation": 0.05, "test": 0.1},
    },
]

STAGES: list[dict[str, Any]] = [
    {"name": "domain", "pretrain": {"dataset": "manuals", "lora": {"rank": 4}}},
    {"name": "sft", "sft": {"dataset": "tickets", "lora": {"rank": 4}}},
    {"name": "dpo", "dpo": {"dataset": "prefs", "lora": {"rank": 4}}},
    {"name": "final", "merge": {}},
    {
        "name": "exam",
        "evaluate": {
            "suites": [
                {"perplexity": {"dataset": "tickets"}},
                {"preferenceAccuracy": {"dataset": "prefs"}},
                {"winRate": {"dataset": "prefs", "judge": {"rule": {"maxSentences": 1}}}},
            ]
        },
    },
]


def pipeline_body(
    *,
    name: str = "assistant",
    namespace: str = "team-a",
    uid: str = "0b9b5a4e-0000-4000-8000-000000000001",
    generation: int = 1,
    datasets: list[dict[str, Any]] | None = None,
    stages: list[dict[str, Any]] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """An AlignmentPipeline with every stage type; parts can be replaced."""
    return copy.deepcopy(
        {
            "apiVersion": "plumbline.dev/v1alpha1",
            "kind": "AlignmentPipeline",
            "metadata": {"name": name, "namespace": namespace, "uid": uid, "generation": generation},
            "spec": {
                "model": {"source": "s3://models/tiny"},
                "storage": {"uri": "s3://alignment/team-a", "secretName": "s3-credentials"},
                "datasets": DATASETS if datasets is None else datasets,
                "stages": STAGES if stages is None else stages,
                **spec,
            },
        }
    )


def runtime_body(*, name: str = "cpu", **spec: Any) -> dict[str, Any]:
    """An AlignmentRuntime without an accelerator."""
    return copy.deepcopy(
        {
            "apiVersion": "plumbline.dev/v1alpha1",
            "kind": "AlignmentRuntime",
            "metadata": {"name": name, "annotations": {"plumbline.dev/is-default-runtime": "true"}},
            "spec": {"image": "registry.example/plumbline-trainer:test", **spec},
        }
    )


def problems_with(body: dict[str, Any], runtime: dict[str, Any] | None = None, place: str = "anywhere") -> list[str]:
    """What parsing and checking say of a manifest."""
    try:
        pipeline = AlignmentPipeline.parse(body)
    except ManifestError as error:
        return [str(p) for p in error.problems]
    offered = None if runtime is None else AlignmentRuntime.parse(runtime)
    return [str(p) for p in check(pipeline, offered, place=place)]  # type: ignore[arg-type]


def stages_with(index: int, **changes: Any) -> list[dict[str, Any]]:
    """The stages with changes to one."""
    stages = [dict(stage) for stage in STAGES]
    stages[index] = {**stages[index], **changes}
    return stages


def retyped(index: int, **type_: Any) -> list[dict[str, Any]]:
    """The stages with one of another type."""
    stages = [dict(stage) for stage in STAGES]
    stages[index] = {"name": stages[index]["name"], **type_}
    return stages


REWARD = {"name": "reward", "rewardModel": {"dataset": "prefs", "lora": {"rank": 4}}}


def exam_of(name: str, *, judge: dict[str, Any], **evaluate: Any) -> dict[str, Any]:
    """An evaluation by a judge."""
    return {"name": name, "evaluate": {"suites": [{"winRate": {"dataset": "prefs", "judge": judge}}], **evaluate}}
