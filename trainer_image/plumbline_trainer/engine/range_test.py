"""What a learning-rate range test says: where the loss falls fastest, and where it runs away. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SMOOTHING = 0.9
"""Weight of what came before in the smoothed loss."""
SLOPE_SHARE = 0.1
SLOPE_POINTS_MIN = 5
"""The slope at a step is that of a line through a tenth of the points, at least five."""
WATCH_FROM = 5
"""Steps before which nothing counts as divergence."""


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average, corrected for its start: m_t = βm_{t−1} + (1 − β)l_t, shown as m_t / (1 − β^t)."""
    found, mean = [], 0.0
    for number, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1.0 - SMOOTHING) * loss
        found.append(mean / (1.0 - SMOOTHING**number))
    return found


def diverges(losses: Sequence[float]) -> bool:
    """Whether the smoothed loss lies above its lowest point by more than what the loss was at first."""
    if len(losses) < WATCH_FROM:
        return False
    means = smoothed(losses)
    return means[-1] > min(means) + abs(losses[0])


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the smoothed loss falls fastest over the logarithm of the rate; None where it never falls.

    Only points up to the lowest smoothed loss count.
    """
    means = smoothed(losses)
    if not means:
        return None
    width = max(SLOPE_POINTS_MIN, round(SLOPE_SHARE * len(means)))
    end = max(min(range(len(means)), key=means.__getitem__) + 1, width)
    if len(means) < width:
        return None
    places = np.log([float(rate) for rate in rates[:end]])
    slopes = [
        (float(np.polyfit(places[start : start + width], means[start : start + width], 1)[0]), start)
        for start in range(end - width + 1)
    ]
    steepest, start = min(slopes)
    if steepest >= 0:
        return None
    return math.exp(float(places[start : start + width].mean()))
