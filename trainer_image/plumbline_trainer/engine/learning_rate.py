"""Learning-rate schedules by way of transformers and torch: a peak rate times a function of the step number.

Every schedule is a `LambdaLR`, a closed form of the step, so that a resumed run needs the step number only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from plumbline_api.training import Schedule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

Factor = Callable[[int], float]
"""Step number, from 0 → share of the peak rate."""

CYCLES, STEP_FACTOR, POWER = 2, 0.1, 1.0
"""Where the schedule does not say."""


def warmup_steps(schedule: Schedule, steps: int) -> int:
    """Steps in which the rate rises from zero: the given number, else ⌈share · steps⌉."""
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return math.ceil(schedule.warmup_ratio * steps)


def make_schedule(schedule: Schedule, optimizer: Optimizer, steps: int) -> LambdaLR:
    """The schedule over `steps` optimizer steps, of which the first w are the warm-up. With s the step number:

    - warm-up: s / w
    - constant: 1
    - linear: (1 − f)·(1 − p) + f, with p = (s − w) / (steps − w) and f the final ratio
    - cosine: (1 − f)·½(1 + cos πp) + f
    - cosineRestarts: the same with the fraction of cycles·p
    - step: factor^⌊(s − w) / everySteps⌋, or factor^(how many of `at`·steps lie at or before s)
    - polynomial: (1 − f)·(1 − p)^power + f
    - inverseSquareRoot: √(w' / (s − w + w')), with w' = max(w, 1)
    """
    warmup = warmup_steps(schedule, steps)
    if schedule.type == "step":
        return LambdaLR(optimizer, _steps_down(schedule, warmup, steps))
    name, extra = _named(schedule, warmup)
    # Where all steps are warm-up some shapes would divide by zero at the step that is never taken.
    steps = max(steps, warmup + 1)
    found: LambdaLR = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=extra
    )
    if schedule.final_ratio:
        # Every shape begins at 1 after the warm-up, so that the rate of the first step, which is set already, holds.
        found.lr_lambdas = [_raised(factor, warmup, schedule.final_ratio) for factor in found.lr_lambdas]
    return found


def _named(schedule: Schedule, warmup: int) -> tuple[str, dict[str, Any]]:
    """The name of a schedule in transformers, and its own arguments."""
    match schedule.type:
        case "constant":
            return "constant_with_warmup", {}
        case "cosineRestarts":
            return "cosine_with_restarts", {"num_cycles": schedule.cycles or CYCLES}
        case "polynomial":
            return "polynomial", {"lr_end": 0.0, "power": schedule.power or POWER}
        case "inverseSquareRoot":
            return "inverse_sqrt", {"timescale": max(warmup, 1)}
        case plain:
            return plain, {}


def _raised(factor: Factor, warmup: int, floor: float) -> Factor:
    """A falling schedule that ends at `floor` instead of 0; the warm-up stays as it is."""
    return lambda step: factor(step) if step < warmup else floor + (1.0 - floor) * factor(step)


def _steps_down(schedule: Schedule, warmup: int, steps: int) -> Factor:
    ratio = schedule.factor or STEP_FACTOR
    # The tolerance keeps 0.1 · 30 = 3.0000000000000004 from becoming step four.
    places = [math.ceil(share * steps - 1e-9) for share in schedule.at or ()]

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if schedule.every_steps is not None:
            return float(ratio ** ((step - warmup) // schedule.every_steps))
        return float(ratio ** sum(place <= step for place in places))

    return factor


def make_sweep(optimizer: Optimizer, growth: float, steps: int) -> LambdaLR:
    """A range test (Smith 2015): growth^(s / (steps − 1)), from the rate as it is to `growth` times it."""
    return LambdaLR(optimizer, lambda step: growth ** (step / max(steps - 1, 1)))
