"""Which evaluation's weights a stage yields, and when it stops for want of improvement."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from plumbline_api.training import EarlyStopping, Training
from torch import nn

from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.sharding import put
from plumbline_trainer.engine.state import SELECTED, TrainingState, load_weights, write_weights
from plumbline_trainer.errors import InputError


class Selection:
    """Looks at every evaluation. What it knows lies in the state and in one file of weights, both in each checkpoint.

    The start counts as an evaluation: where training only makes things worse, the stage yields what it started with.
    """

    def __init__(self, training: Training, state: TrainingState, folder: Path) -> None:
        """Prepare.

        Args:
            training: The stage's optimisation parameters.
            state: Of the stage; `selected`, `bar`, `waited` and `ended` are kept here.
            folder: Where the weights lie meanwhile.
        """
        self.stopping = training.early_stopping
        self.selects = training.selects_best
        self.state = state
        self.path = folder / SELECTED
        rule = self.stopping or EarlyStopping()
        self.metric, self.sign = rule.metric, -1.0 if rule.direction == "min" else 1.0

    def observe(self, means: Mapping[str, float], trainables: Mapping[str, nn.Parameter], *, writes: bool) -> bool:
        """Take an evaluation into account; whether the stage stops here.

        Args:
            means: Figures of the evaluation.
            trainables: The weights that were evaluated.
            writes: Whether this rank keeps weights.

        Raises:
            InputError: if the evaluations have no such figure.
        """
        if self.stopping is None and not self.selects:
            return False
        if self.metric not in means:
            raise InputError(
                f"training.earlyStopping.metric: there is no {self.metric}. Evaluations of this stage give: "
                f"{', '.join(means)}"
            )
        value = self.sign * means[self.metric]
        finite = math.isfinite(value)
        selected = self.state.selected
        if self.selects and finite and (not selected or value > self.sign * selected[self.metric]):
            self.state.selected = {**means, "step": float(self.state.step)}
            if writes:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            write_weights(self.path, trainables, writes=writes)
        return self.stopping is not None and self._waited_out(value if finite else None, self.stopping)

    def _waited_out(self, value: float | None, stopping: EarlyStopping) -> bool:
        """Count evaluations that do not clear the bar; one that is not finite never does."""
        if value is not None and (self.state.bar is None or value > self.state.bar + stopping.min_delta):
            self.state.bar, self.state.waited = value, 0
            return False
        self.state.waited += 1
        if self.state.waited < stopping.patience:
            return False
        self.state.ended = (
            f"{self.metric} has not improved for {self.state.waited} evaluations (earlyStopping.patience)"
        )
        return True

    def keep_in(self, folder: Path) -> None:
        """Put the selected weights into a checkpoint's folder."""
        if self.state.selected:
            shutil.copyfile(self.path, folder / SELECTED)

    def take_from(self, folder: Path) -> None:
        """Take the selected weights out of a checkpoint's folder, which does not last."""
        if self.state.selected:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / SELECTED, self.path)

    def put_back(self, trainables: Mapping[str, nn.Parameter], ranks: Ranks | None = None) -> None:
        """Make the selected weights, which rank 0 has kept, the model's own on every rank."""
        if not self.state.selected:
            return
        ranks = ranks or Ranks()
        kept = load_weights(self.path, trainables) if ranks.is_main else {}
        for name, parameter in trainables.items():
            value = kept[name].to(ranks.device) if ranks.is_main else torch.empty(parameter.shape, device=ranks.device)
            ranks.share([value])
            put(parameter, value)
