"""Advantage-weighted regression: how much each logged answer counts. The loss itself is `losses/likelihood.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expectile(values: Tensor, tau: float) -> Tensor:
    """The τ-expectile of a sample (Newey and Powell 1987), the baseline of IQL (Kostrikov et al. 2021, eq. 5).

    V = argmin_v Σ_i |τ − 1(x_i < v)|·(x_i − v)²: the mean at τ = ½, towards the largest value as τ → 1. Found exactly:
    if the k smallest values lie below V, then V = ((1 − τ)·Σ_{i≤k} x_i + τ·Σ_{i>k} x_i) / ((1 − τ)·k + τ·(n − k)),
    and the right k gives the largest of these (τ ≥ ½) or the smallest.

    Args:
        values: [n], n at least 1.
        tau: τ between 0 and 1.

    Returns:
        Scalar of the type of `values`.
    """
    ordered = values.sort().values
    below = torch.arange(len(values), device=values.device, dtype=values.dtype)  # k = 0 … n − 1
    lower = torch.cat([values.new_zeros(1), ordered.cumsum(0)[:-1]])
    upper = ordered.sum() - lower
    candidates = ((1 - tau) * lower + tau * upper) / ((1 - tau) * below + tau * (len(values) - below))
    # Rounding must not make one of several equal values better than the others.
    return (candidates.max() if tau >= 0.5 else candidates.min()).clamp(ordered[0], ordered[-1])


def advantage_weights(advantages: Tensor, *, beta: float, clip: float) -> Tensor:
    """w = min(exp(A/β), w_max) of Peng et al. 2019 (eq. 10 and appendix), A = score − V.

    As β → ∞ every weight goes to 1; as β → 0 to w_max above the baseline and to 0 below it.

    Args:
        advantages: [n] A of each answer.
        beta: Temperature β.
        clip: Largest weight w_max.

    Returns:
        [n]
    """
    return (advantages / beta).clamp_max(math.log(clip)).exp()
