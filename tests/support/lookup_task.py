"""A task that a tiny model can learn by reward alone: one letter of the prompt decides which digit is right.

Eight keys, each with its digit, among other letters: every constant answer is right one time in eight. The model is
first taught by sft to answer with some digit, drawn at random, so that nothing of the mapping is in it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plumbline_api.methods import TRAINING_STAGES, Sft
from plumbline_api.stagerun import StageInput, StageRun
from support.tiny import save_model
from support.trainer import base_model, external, output_of, parameters_of, run_in_process, stage_run, write_jsonl

KEYS = "abcdefgh"
DIGITS = "37150264"
NOISE = "mnopqrstuvwxyz"
LETTERS = 4
"""Letters around the key."""


def prompt_of(rng: random.Random) -> tuple[str, str]:
    """A prompt and its right answer."""
    key = rng.randrange(len(KEYS))
    letters = [rng.choice(NOISE) for _ in range(LETTERS)]
    letters.insert(rng.randrange(LETTERS + 1), KEYS[key])
    return " ".join(letters), DIGITS[key]


def rows(count: int, seed: int, *, answers: str = "right") -> list[dict[str, Any]]:
    """Rows of prompt and answer: `right`, `random` digits, or `shuffled`: right answers of other prompts."""
    rng = random.Random(seed)
    pairs = [prompt_of(rng) for _ in range(count)]
    texts = [answer for _, answer in pairs]
    if answers == "random":
        texts = [rng.choice(DIGITS) for _ in pairs]
    elif answers == "shuffled":
        rng.shuffle(texts)
    return [{"prompt": prompt, "completion": text} for (prompt, _), text in zip(pairs, texts, strict=True)]


@dataclass(frozen=True)
class Learner:
    """A model that answers with some digit, to start from."""

    folder: Path
    sft: StageRun


def taught(folder: Path) -> Learner:
    """Teach a tiny random model the form of an answer."""
    model = save_model(folder / "model", "llama")
    data = write_jsonl(folder / "form.jsonl", rows(512, seed=1, answers="random"))
    parameters = Sft.model_validate(
        {"dataset": "form", "training": {"globalBatch": 64, "epochs": 12, "learningRate": 3e-3, "maxLength": 64}}
    )
    run = stage_run(
        folder,
        "sft",
        parameters=parameters_of(parameters, seed=1),
        inputs=[base_model(f"file://{model}"), external("dataset", data, format="promptCompletion")],
    )
    result, code = run_in_process(folder, run)
    assert code == 0, result.message
    return Learner(folder, run)


def learning_run(
    learner: Learner,
    type_: str,
    *,
    seed: int,
    rewards: list[dict[str, Any]] | None = None,
    answers: str = "right",
    steps: int = 60,
    fields: dict[str, Any] | None = None,
    processes: int = 1,
    abort_when: list[dict[str, Any]] | None = None,
    **training: Any,
) -> StageRun:
    """A stage that starts from the learner and is scored on prompts held out by their hash."""
    data = write_jsonl(learner.folder / f"{answers}.jsonl", rows(640, seed=2, answers=answers))
    stage = {
        "prompts": "task",
        "rewards": rewards or [{"rule": "exactMatch"}],
        "rollout": {"maxNewTokens": 4},
        "training": {
            "globalBatch": 64,
            "epochs": 100,
            "maxSteps": steps,
            "learningRate": 3e-3,
            "schedule": {"type": "constant"},
            "maxLength": 64,
            "tokensPerBatch": 16384,
            **training,
        },
        **(fields or {}),
    }
    parameters = parameters_of(TRAINING_STAGES[type_].model_validate(stage), seed=seed)
    if abort_when:
        parameters["abortWhen"] = abort_when
    start: StageInput = output_of(learner.sft)
    task = external("prompts", data, format="promptCompletion", split={"evaluation": 0.2, "test": 0})
    return stage_run(learner.folder, type_, parameters=parameters, inputs=[start, task], processes=processes)
