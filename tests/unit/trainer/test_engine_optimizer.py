"""AdamW, schedule, clipping, and their way through a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.training import Schedule, Training
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.optimizer import Optimizer, named_trainables
from plumbline_trainer.engine.state import TrainingState, read_progress, read_state, write_state
from plumbline_trainer.errors import InputError
from torch import nn


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.full((2, 2), 1.0))
        self.norm = nn.Parameter(torch.full((2,), 1.0))
        self.frozen = nn.Parameter(torch.full((2,), 1.0), requires_grad=False)


def make(steps: int = 10, **changes: Any) -> tuple[Small, Optimizer]:
    model = Small()
    fields: dict[str, Any] = {"learning_rate": 0.1, "schedule": Schedule(type="constant", warmup_ratio=0.0), **changes}
    return model, Optimizer(named_trainables(model), Training(**fields), steps)


def give_gradients(model: Small, matrix: float, norm: float) -> None:
    model.matrix.grad = torch.full((2, 2), matrix)
    model.norm.grad = torch.full((2,), norm)


def test_first_step_by_hand() -> None:
    """Adam's first step moves every weight by the rate, against the sign of its gradient."""
    model, optimizer = make()
    give_gradients(model, 0.01, -0.02)
    norm = optimizer.step(Ranks())
    assert norm == pytest.approx(math.sqrt(4 * 0.01**2 + 2 * 0.02**2))
    assert model.matrix.tolist() == [[pytest.approx(0.9, abs=1e-6)] * 2] * 2
    assert model.norm.tolist() == [pytest.approx(1.1, abs=1e-6)] * 2
    assert model.frozen.tolist() == [1.0, 1.0]
    assert model.matrix.grad is None


def test_weight_decay_spares_norms_and_biases() -> None:
    model, optimizer = make(weight_decay=0.5)
    give_gradients(model, 0.0, 0.0)
    optimizer.step(Ranks())
    assert model.matrix.tolist() == [[pytest.approx(1 - 0.1 * 0.5)] * 2] * 2
    assert model.norm.tolist() == [1.0, 1.0]


def test_clipping_scales_by_the_global_norm() -> None:
    model, optimizer = make(gradient_clip=1.0, adam_epsilon=1.0)
    give_gradients(model, 3.0, 0.0)
    assert optimizer.step(Ranks()) == pytest.approx(6.0)
    # Clipped to 3/6; with ε = 1 Adam moves by rate · g / (|g| + ε).
    assert model.matrix[0, 0].item() == pytest.approx(1 - 0.1 * 0.5 / 1.5, abs=1e-5)


def test_gradients_that_are_not_finite_change_nothing() -> None:
    model, optimizer = make()
    give_gradients(model, float("nan"), 1.0)
    assert not math.isfinite(optimizer.step(Ranks()))
    assert model.norm.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("type_", "rates"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules(type_: Any, rates: list[float]) -> None:
    model, optimizer = make(steps=6, learning_rate=1.0, schedule=Schedule(type=type_, warmup_ratio=1 / 3))
    found = []
    for _ in rates:
        found.append(optimizer.learning_rate)
        give_gradients(model, 1e-3, 1e-3)
        optimizer.step(Ranks())
    assert found == pytest.approx(rates, abs=1e-6)


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    def walk(model: Small, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            give_gradients(model, math.sin(step), math.cos(step))
            optimizer.step(Ranks())

    settings: dict[str, Any] = {"schedule": Schedule(type="cosine", warmup_ratio=0.3), "weight_decay": 0.1}
    model, optimizer = make(**settings)
    walk(model, optimizer, range(4))
    state = TrainingState(step=4, tokens=17, path="plain", start={"evalLoss": 1 / 3}, recent=[{"loss": math.pi}])
    write_state(tmp_path / "checkpoint", state, optimizer.trainables, optimizer)
    walk(model, optimizer, range(4, 10))

    again, other = make(**settings)
    assert read_progress(tmp_path / "checkpoint") == state
    read_state(tmp_path / "checkpoint", other.trainables, other)
    walk(again, other, range(4, 10))
    assert torch.equal(again.matrix, model.matrix)
    assert torch.equal(again.norm, model.norm)
    assert other.learning_rate == optimizer.learning_rate


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    _, optimizer = make()
    write_state(tmp_path / "checkpoint", TrainingState(), optimizer.trainables, optimizer)
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="does not fit"):
        read_state(tmp_path / "checkpoint", dict(other.named_parameters()), optimizer)


def test_nothing_to_train_is_refused() -> None:
    model = Small().requires_grad_(False)
    with pytest.raises(InputError, match="nothing would be trained"):
        named_trainables(model)
