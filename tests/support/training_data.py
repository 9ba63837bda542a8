"""Small data sets and stage runs for tests of the training stages."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from plumbline_api.methods import TRAINING_STAGES
from plumbline_api.online import ONLINE_STAGES
from plumbline_api.stagerun import StageRun
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
    """Rows of uneven length: `text`, `promptCompletion`, `unpaired`, `preference` or `ranked`."""
    rng = random.Random(seed)
    if kind == "text":
        return [{"text": phrase(rng, 3, 40)} for _ in range(count)]
    if kind == "promptCompletion":
        return [{"prompt": f"{n}: {phrase(rng, 2, 15)}", "completion": phrase(rng, 1, 20)} for n in range(count)]
    if kind == "ranked":
        return [
            {"prompt": f"{n}: {phrase(rng, 2, 15)}", "completions": [phrase(rng, 1, 9) for _ in range(2 + n % 3)]}
            for n in range(count)
        ]
    if kind == "unpaired":
        return [
            {"prompt": f"{n}: {phrase(rng, 2, 25)}", "completion": phrase(rng, 1, 12), "label": rng.random() < 0.5}
            for n in range(count)
        ]
    return [
        {"prompt": f"{n}: {phrase(rng, 2, 25)}", "chosen": phrase(rng, 1, 12), "rejected": phrase(rng, 1, 12)}
        for n in range(count)
    ]


FORMATS = {
    "pretrain": "text",
    "sft": "promptCompletion",
    "kto": "unpaired",
    **dict.fromkeys(ONLINE_STAGES, "promptCompletion"),
}
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
    form: str = "",
    stage: dict[str, Any] | None = None,
    abort_when: list[dict[str, Any]] | None = None,
    others: dict[str, str] | None = None,
    test: float = 0.0,
    **training: Any,
) -> StageRun:
    """A training stage on a tiny model and small data, both made under `folder` when they are not there yet.

    `others` are further datasets by role, such as `rehearsal.0.dataset`, each with the kind of its rows.
    """
    model = folder / f"model-{style}-{dtype}"
    if not model.exists():
        save_model(model, style, dtype=dtype)
    form = form or FORMATS.get(type_, "preference")
    data = folder / f"{form}-{rows}.jsonl"
    uri = f"file://{data}" if data.exists() else write_jsonl(data, rows_of(form, rows))
    online = type_ in ONLINE_STAGES
    fields: dict[str, Any] = {"prompts" if online else "dataset": "data", "training": training, **(stage or {})}
    if lora is not None:
        fields["lora"] = lora
    parameters = parameters_of(TRAINING_STAGES[type_].model_validate(fields), seed=seed)
    if abort_when:
        parameters["abortWhen"] = abort_when
    split = {"evaluation": evaluation, "test": test}
    inputs = [
        base_model(f"file://{model}"),
        external("prompts" if online else "dataset", uri, format=form, split=split),
    ]
    for number, (role, kind) in enumerate((others or {}).items()):
        other = write_jsonl(folder / f"other-{number}.jsonl", rows_of(kind, rows, seed=100 + number))
        inputs.append(external(role, other, name=f"other-{number}", format=kind, split={"evaluation": 0, "test": 0}))
    return stage_run(
        folder,
        type_,
        parameters=parameters,
        inputs=inputs,
        processes=processes,
        attempt=attempt,
    )
