"""What a checkpoint holds: trained weights and optimizer moments by parameter name, the rest as JSON.

Random numbers are keyed by seed and step, and the data order is a function of seed and epoch, so that the step number
is all there is to keep of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plumbline_trainer.engine import scorer
from plumbline_trainer.engine.optimizer import Optimizer
from plumbline_trainer.engine.sharding import gathered, put

WEIGHTS = "trainables.safetensors"
SELECTED = "selected.safetensors"
"""Weights of the evaluation that the stage would yield; there only where it selects."""
MOMENTS = "optimizer.safetensors"
STATE = "state.json"
VERSION = 1


@dataclass
class TrainingState:
    """How far a stage has come."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens of the rows trained on, on all ranks."""
    path: scorer.Path | None = None
    """Which way the model is evaluated; decided once per stage."""
    start: dict[str, float] = field(default_factory=dict)
    """Evaluation before the first step."""
    latest: dict[str, float] = field(default_factory=dict)
    """Last evaluation."""
    evaluated: int = -1
    """Step of the last evaluation."""
    best: dict[str, float] = field(default_factory=dict)
    """Evaluation with the lowest loss, and its step."""
    selected: dict[str, float] = field(default_factory=dict)
    """Evaluation whose weights the stage yields, and its step; empty where it yields the last ones."""
    bar: float | None = None
    """Value that the next evaluation has to improve on by `minDelta`, for early stopping."""
    waited: int = 0
    """Evaluations since the bar was last raised."""
    ended: str = ""
    """Why the stage takes no further step although some are left; empty while it goes on."""
    sweep: list[list[float]] = field(default_factory=list)
    """Learning rate and loss of every step, in a range test."""
    recent: list[dict[str, float]] = field(default_factory=list)
    """Figures of the last steps."""


def write_state(
    folder: Path,
    state: TrainingState,
    trainables: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    *,
    writes: bool = True,
) -> None:
    """Write a checkpoint's files; the tensors are copied out of the device now.

    Every rank calls it, because sharded tensors are put together; one writes.
    """
    if writes:
        folder.mkdir(parents=True)
    write_weights(folder / WEIGHTS, trainables, writes=writes)
    moments = gathered(optimizer.tensors(), keeps=writes)
    if not writes:
        return
    save_file(moments, folder / MOMENTS)
    document = {"version": VERSION, "state": asdict(state), "optimizer": optimizer.state()}
    # Python writes floats so that reading gives the same bits.
    (folder / STATE).write_text(json.dumps(document), encoding="utf-8")


def write_weights(path: Path, trainables: Mapping[str, nn.Parameter], *, writes: bool = True) -> None:
    """Write trained weights by parameter name. Every rank calls it; one writes."""
    weights = gathered(trainables, keeps=writes)
    if writes:
        save_file(weights, path)


def read_weights(path: Path, trainables: Mapping[str, nn.Parameter]) -> None:
    """Put trained weights back, exactly.

    Raises:
        ValueError: if they are of another model or adapter.
    """
    weights = load_weights(path, trainables)
    for name, parameter in trainables.items():
        put(parameter, weights[name])


def load_weights(path: Path, trainables: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Trained weights from a file, whole.

    Raises:
        ValueError: if they are of another model or adapter.
    """
    weights: dict[str, Tensor] = load_file(path)
    if set(weights) != set(trainables):
        odd = min(set(weights) ^ set(trainables))
        raise ValueError(f"the checkpoint does not fit the stage: {odd} is only in one of them")
    return weights


def read_progress(folder: Path) -> TrainingState:
    """The part of a checkpoint that says how far it is."""
    return TrainingState(**_document(folder)["state"])


def read_state(folder: Path, trainables: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    """Put weights, moments and schedule back, exactly.

    Raises:
        ValueError: if the checkpoint is of another model or adapter.
    """
    read_weights(folder / WEIGHTS, trainables)
    optimizer.restore(load_file(folder / MOMENTS), _document(folder)["optimizer"])


def _document(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if document.get("version") != VERSION:
        raise ValueError(f"a checkpoint of version {document.get('version')}; this trainer reads {VERSION}")
    return document
