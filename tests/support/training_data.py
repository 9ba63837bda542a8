"""Small data sets and stage runs for tests of the training stages."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from plumbline_api.stagerun import StageRun
from plumbline_api.training import TRAINING_STAGES
from support.tiny import save_model
from support.trainer import base_model, external, parameters_of, stage_run, write_jsonl

WORDS = [
    "a",
    "plumb",
    "line",
    "hangs",
    "straight",
    "down",
    "and",
    "shows",
    "whether",
    "the",
    "wall",
    "stands",
    "true",
    "or",
    "leans",
    "to",
    "one",
    "side",
]


def phrase(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def rows_of(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of uneven length: `text`, `promptCompletion` or `preference`."""
    rng = random.Random(seed)
    if kind == "text":
        return [{"text": phrase(rng, 3, 40)} for _ in range(count)]
    if kind == "promptCompletion":
        return [{"prompt": f"{n}: {phrase(rng, 2, 15)}", "completion": phrase(rng, 1, 20)} for n in range(count)]
    return [
        {"prompt": f"{n}: {phrase(rng, 2, 25)}", "chosen": phrase(rng, 1, 12), "rejected": phrase(rng, 1, 12)}
        for n in range(count)
    ]


FORMATS = {"pretrain": "text", "sft": "promptCompletion"}
"""Format of the rows of a stage type; preference rows where none is named."""


def training_run(
    folder: Path,
    type_: str,
    *,
    lora: dict[str, Any] | None = None,
    seed: int = 3,
    rows: int = 24,
    evaluation: float = 0.0,
    style: Any = "llama",
    processes: int = 1,
    attempt: int = 1,
    dtype: Any = "float32",
    stage: dict[str, Any] | None = None,
    **training: Any,
) -> StageRun:
    """A training stage on a tiny model and small data, both made under `folder` when they are not there yet."""
    model = folder / f"model-{style}-{dtype}"
    if not model.exists():
        save_model(model, style, dtype=dtype)
    form = FORMATS.get(type_, "preference")
    data = folder / f"{form}-{rows}.jsonl"
    uri = f"file://{data}" if data.exists() else write_jsonl(data, rows_of(form, rows))
    fields: dict[str, Any] = {"dataset": "data", "training": training, **(stage or {})}
    if lora is not None:
        fields["lora"] = lora
    parameters = parameters_of(TRAINING_STAGES[type_].model_validate(fields), seed=seed)
    split = {"evaluation": evaluation, "test": 0.0}
    return stage_run(
        folder,
        type_,
        parameters=parameters,
        inputs=[base_model(f"file://{model}"), external("dataset", uri, format=form, split=split)],
        processes=processes,
        attempt=attempt,
    )
