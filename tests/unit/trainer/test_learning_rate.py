"""Every schedule against its closed form, and taken up again in the middle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plumbline_api.training import Schedule, Training
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.optimizer import Optimizer
from pydantic import ValidationError
from torch import nn

STEPS, PEAK = 40, 0.5


def share(step: int, warmup: int) -> float:
    return (step - warmup) / (STEPS - warmup)


def cosine(part: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * part))


CASES: dict[str, tuple[dict[str, Any], int, Callable[[int], float]]] = {
    "constant": ({"type": "constant", "warmupRatio": 0.1}, 4, lambda s: 1.0),
    "no warm-up": ({"type": "constant", "warmupRatio": 0.0}, 0, lambda s: 1.0),
    "linear": ({"type": "linear", "warmupRatio": 0.25}, 10, lambda s: 1 - share(s, 10)),
    "linear to a tenth": (
        {"type": "linear", "warmupSteps": 5, "finalRatio": 0.1},
        5,
        lambda s: 0.1 + 0.9 * (1 - share(s, 5)),
    ),
    "cosine": ({"type": "cosine", "warmupSteps": 8}, 8, lambda s: cosine(share(s, 8))),
    "cosine to a fifth": (
        {"type": "cosine", "warmupSteps": 0, "finalRatio": 0.2},
        0,
        lambda s: 0.2 + 0.8 * cosine(share(s, 0)),
    ),
    "restarts, two by default": (
        {"type": "cosineRestarts", "warmupSteps": 4},
        4,
        lambda s: cosine((2 * share(s, 4)) % 1),
    ),
    "four restarts to a tenth": (
        {"type": "cosineRestarts", "cycles": 4, "finalRatio": 0.1, "warmupSteps": 0},
        0,
        lambda s: 0.1 + 0.9 * cosine((4 * share(s, 0)) % 1),
    ),
    "every ten steps": (
        {"type": "step", "everySteps": 10, "factor": 0.5, "warmupSteps": 3},
        3,
        lambda s: 0.5 ** ((s - 3) // 10),
    ),
    "at two shares": (
        {"type": "step", "at": [0.5, 0.75], "warmupSteps": 0},
        0,
        lambda s: 1.0 if s < 20 else 0.1 if s < 30 else 0.01,
    ),
    "polynomial": (
        {"type": "polynomial", "power": 2, "finalRatio": 0.25, "warmupSteps": 2},
        2,
        lambda s: 0.25 + 0.75 * (1 - share(s, 2)) ** 2,
    ),
    "polynomial of power one": ({"type": "polynomial", "warmupSteps": 0}, 0, lambda s: 1 - share(s, 0)),
    "inverse square root": ({"type": "inverseSquareRoot", "warmupSteps": 9}, 9, lambda s: math.sqrt(9 / s)),
    "inverse square root at once": (
        {"type": "inverseSquareRoot", "warmupSteps": 0},
        0,
        lambda s: 1 / math.sqrt(s + 1),
    ),
}


def make(schedule: dict[str, Any], steps: int = STEPS) -> tuple[nn.Parameter, Optimizer]:
    parameter = nn.Parameter(torch.full((2, 2), 1.0))
    training = Training(learning_rate=PEAK, schedule=Schedule.model_validate(schedule))
    return parameter, Optimizer({"weight": parameter}, training, steps)


def walk(parameter: nn.Parameter, optimizer: Optimizer, steps: range) -> list[float]:
    rates = []
    for step in steps:
        rates.append(optimizer.learning_rate)
        assert optimizer.adamw.param_groups[0]["lr"] == pytest.approx(rates[-1], rel=1e-12)
        parameter.grad = torch.full((2, 2), math.sin(step + 1.0))
        optimizer.step(Ranks())
    return rates


@pytest.mark.parametrize("name", CASES)
def test_closed_form(name: str) -> None:
    schedule, warmup, after = CASES[name]
    rates = walk(*make(schedule), range(STEPS))
    expected = [PEAK * (step / warmup if step < warmup else after(step)) for step in range(STEPS)]
    assert rates == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stop", [1, 7, 23])
def test_taken_up_in_the_middle(name: str, stop: int) -> None:
    parameter, optimizer = make(CASES[name][0])
    walk(parameter, optimizer, range(stop))
    kept, tensors, state = parameter.detach().clone(), optimizer.tensors(), optimizer.state()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    whole = walk(parameter, optimizer, range(stop, STEPS))

    again, other = make(CASES[name][0])
    with torch.no_grad():
        again.copy_(kept)
    other.restore(tensors, state)
    assert walk(again, other, range(stop, STEPS)) == whole
    assert torch.equal(again, parameter)


@pytest.mark.parametrize("type_", ["linear", "cosine", "cosineRestarts", "polynomial", "inverseSquareRoot", "constant"])
def test_all_steps_may_be_warm_up(type_: str) -> None:
    assert walk(*make({"type": type_, "warmupRatio": 1.0}, steps=1), range(1)) == [0.0]
    rates = walk(*make({"type": type_, "warmupSteps": 8}, steps=4), range(4))
    assert rates == pytest.approx([0.0, PEAK / 8, PEAK / 4, 3 * PEAK / 8])


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"type": "cosine", "cycles": 3}, "cycles belongs to type cosineRestarts, not to cosine"),
        ({"type": "constant", "finalRatio": 0.1}, "finalRatio belongs to type linear or cosine or cosineRestarts"),
        ({"type": "linear", "power": 2}, "power belongs to type polynomial"),
        ({"type": "step"}, "needs either everySteps or at"),
        ({"type": "step", "everySteps": 3, "at": [0.5]}, "not both"),
    ],
)
def test_fields_of_another_shape_are_refused(schedule: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Schedule.model_validate(schedule)
