"""Pipelines of a tiny model and small files, and preflight over them in this process."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from plumbline_api.runtime import RewardEndpoint
from plumbline_api.stagerun import StageResult
from support.trainer import LocalPipeline, run_in_process, write_jsonl


def rows(count: int = 40, start: int = 0) -> list[dict[str, str]]:
    return [{"instruction": f"Say {i}", "output": f"It is {i}."} for i in range(start, start + count)]


def pairs(count: int = 40) -> list[dict[str, str]]:
    return [{"prompt": f"Say {i}", "chosen": f"It is {i}.", "rejected": f"No {i}."} for i in range(count)]


def pipeline(
    folder: Path,
    model: Path | str,
    stages: list[dict[str, Any]] | None = None,
    *,
    others: tuple[dict[str, Any], ...] = (),
    endpoints: tuple[RewardEndpoint, ...] = (),
    **q: Any,
) -> LocalPipeline:
    if not (folder / "q.jsonl").exists():
        write_jsonl(folder / "q.jsonl", rows())
        write_jsonl(folder / "p.jsonl", pairs())
    training = {"globalBatch": 8, "maxLength": 64}
    datasets = [
        {"name": "q", "source": f"file://{folder}/q.jsonl", "split": {"test": 0.2}} | q,
        {"name": "p", "source": f"file://{folder}/p.jsonl", "split": {"test": 0.2}},
        *others,
    ]
    body = {
        "apiVersion": "plumbline.dev/v1alpha1",
        "kind": "AlignmentPipeline",
        "metadata": {"name": "tiny"},
        "spec": {
            "model": {"source": model if isinstance(model, str) else f"file://{model}"},
            "datasets": datasets,
            "stages": stages
            or [
                {"name": "sft", "sft": {"dataset": "q", "lora": {"rank": 4}, "training": training | {"epochs": 2}}},
                {"name": "dpo", "dpo": {"dataset": "p", "lora": {"rank": 4}, "training": training}},
                {"name": "final", "merge": {}},
                {"name": "exam", "evaluate": {"suites": [{"perplexity": {"dataset": "q"}}]}},
            ],
        },
    }
    return LocalPipeline(body, folder, endpoints=endpoints)


def preflight(made: LocalPipeline, number: int = 1) -> tuple[StageResult, int]:
    scratch = made.folder / f"attempt-{number}"
    result, code = run_in_process(scratch, made.preflight())
    if result.preflight is not None:
        made.pins = [base64.urlsafe_b64decode(digest + "=").hex() for digest in result.preflight.digests]
    return result, code


def plan_of(made: LocalPipeline) -> dict[str, Any]:
    (path,) = (made.folder / "storage").rglob("plan.json")
    return dict(json.loads(path.read_text()))
