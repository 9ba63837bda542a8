"""What a checkpoint of a stage that samples holds: weights and moments, figures, controllers, perhaps a rollout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from plumbline_api.online import ABORTED
from plumbline_api.training import Training
from plumbline_api.watched import by_importance
from safetensors.torch import load_file, save_file
from torch import Tensor

from plumbline_trainer.engine.experience import Experience
from plumbline_trainer.engine.optimizer import Optimizer
from plumbline_trainer.engine.scorer import Path as ScorerPath
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.state import read_weights, write_weights

STATE, ROLLOUT, GOOD = "online.json", "rollout.safetensors", "good.safetensors"
VERSION = 1


class Kept(Protocol):
    """Something with numbers that a checkpoint keeps: a controller, running statistics, a watch."""

    def state(self) -> dict[str, Any]:
        """As JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there, exactly."""
        ...


@dataclass
class OnlineState:
    """How far a stage has come."""

    step: int = 0
    """Iterations done."""
    updates: int = 0
    """Optimizer steps done in the iteration that is under way."""
    seen: list[dict[str, float]] = field(default_factory=list)
    """Figures of those updates."""
    tokens: int = 0
    """Tokens of answers and their prompts, on all ranks."""
    path: ScorerPath | None = None
    """Which way the policy is evaluated."""
    critic_path: ScorerPath | None = None
    evaluated: int = -1
    """Step of the last evaluation."""
    start: dict[str, float] = field(default_factory=dict)
    """First evaluation."""
    latest: dict[str, float] = field(default_factory=dict)
    """Last evaluation."""
    figures: dict[str, float] = field(default_factory=dict)
    """Figures of the rollout that is learnt from."""
    recent: list[dict[str, float]] = field(default_factory=list)
    """Figures of the last iterations."""
    good_step: int = 0
    """Iterations done before the weights that the stage would yield if it were aborted."""
    ended: str = ""
    """Why the stage takes no further iteration although some are left."""

    def figures_at_end(self, counts: Mapping[str, float], *, may_be_aborted: bool) -> dict[str, float]:
        """The stage's figures, the deciding ones first, because not all of them travel: evaluations, means over the
        last iterations, totals.

        Args:
            counts: What became of prompts and weights.
            may_be_aborted: Whether there are stop rules.
        """
        found = {name: [item[name] for item in self.recent if name in item] for item in self.recent for name in item}
        means = {name: sum(values) / len(values) for name, values in found.items()}
        known: dict[str, float | None] = {
            ABORTED: float(bool(self.ended)) if may_be_aborted else None,
            "evalRewardStart": self.start.get("evalReward"),
            "goldRewardStart": self.start.get("goldReward"),
            "steps": float(self.step),
            **counts,
            "plainPath": float(self.path == "plain"),
            "tokens": float(self.tokens),
            **by_importance({**means, **self.latest}),
        }
        return {name: value for name, value in known.items() if value is not None}


class Trained:
    """A model that is trained: its scorer, its parameters, its optimizer."""

    def __init__(self, scorer: Scorer, training: Training, steps: int) -> None:
        """Prepare the optimizer for so many steps; the scorer's trainable parameters are float32."""
        self.scorer = scorer
        self.trainables = scorer.trainables()
        self.optimizer = Optimizer(self.trainables, training, steps)

    def copies(self) -> dict[str, Tensor]:
        """The weights as they are now, on the CPU."""
        return {name: parameter.detach().cpu().clone().contiguous() for name, parameter in self.trainables.items()}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Put copies back; the optimizer stays as it is."""
        with torch.no_grad():
            for name, parameter in self.trainables.items():
                parameter.copy_(weights[name])

    def write(self, folder: Path, name: str) -> dict[str, Any]:
        """Write weights and moments; the rest of the optimizer's state as JSON."""
        write_weights(folder / f"{name}.safetensors", self.trainables)
        moments = {key: tensor.cpu().contiguous() for key, tensor in self.optimizer.tensors().items()}
        save_file(moments, folder / f"{name}-optimizer.safetensors")
        return self.optimizer.state()

    def read(self, folder: Path, name: str, state: Mapping[str, Any]) -> None:
        """Put them back, exactly."""
        read_weights(folder / f"{name}.safetensors", self.trainables)
        self.optimizer.restore(load_file(folder / f"{name}-optimizer.safetensors"), state)


def write_online(
    folder: Path,
    state: OnlineState,
    models: Mapping[str, Trained],
    kept: Mapping[str, Kept],
    good: Mapping[str, Tensor],
    experience: Experience | None,
) -> None:
    """Write a checkpoint's files; the tensors are copied out of the device now.

    Args:
        folder: That does not exist yet.
        state: How far the stage has come.
        models: What is trained, by name.
        kept: What else has numbers.
        good: Weights that an aborted stage would yield; empty where nothing aborts it.
        experience: The rollout that is being learnt from, if one is.
    """
    folder.mkdir(parents=True)
    document = {
        "version": VERSION,
        "state": asdict(state),
        "kept": {name: item.state() for name, item in kept.items()},
        "models": {name: model.write(folder, name) for name, model in models.items()},
    }
    if experience is not None:
        save_file(experience.tensors(), folder / ROLLOUT)
    if good:
        save_file(dict(good), folder / GOOD)
    # Python writes floats so that reading gives the same bits.
    (folder / STATE).write_text(json.dumps(document), encoding="utf-8")


def read_online(
    folder: Path, models: Mapping[str, Trained], kept: Mapping[str, Kept]
) -> tuple[OnlineState, dict[str, Tensor], dict[str, Tensor] | None]:
    """Put models and what is kept back, exactly; the state, the good weights and the tensors of a rollout.

    Raises:
        ValueError: if the checkpoint is of another model or adapter.
    """
    document: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if document.get("version") != VERSION:
        raise ValueError(f"a checkpoint of version {document.get('version')}; this trainer reads {VERSION}")
    for name, item in kept.items():
        item.restore(document["kept"][name])
    for name, model in models.items():
        model.read(folder, name, document["models"][name])
    good = load_file(folder / GOOD) if (folder / GOOD).is_file() else {}
    rollout = load_file(folder / ROLLOUT) if (folder / ROLLOUT).is_file() else None
    return OnlineState(**document["state"]), good, rollout
