"""Clipped surrogate losses of policy and critic. N counts tokens of sampled answers, or whole answers.

Where the importance ratio is one of whole answers (RLOO, GSPO), pass an answer's sums in place of a token's values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0


class PolicyTerms(NamedTuple):
    """The policy loss, elementwise, and what is logged about it."""

    loss: Tensor
    """[N]"""
    clipped: Tensor
    """[N] bool, a clip was active: no gradient passes."""
    ratio: Tensor
    """[N] π/π_old."""


def clipped_policy_loss(
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> PolicyTerms:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), with bounds apart (Yu et al. 2025, eq. 10).

    L = max(−A·ρ, −A·clip(ρ, 1 − ε_low, 1 + ε_high)) with ρ = π/π_old. With a dual clip c > 1 (Ye et al. 2020), the loss
    of an action with A < 0 is at most −c·A, so that a ratio far above 1 pushes no further.

    A log-ratio beyond ±20 counts as ±20 and passes no gradient: e^20 is past every clip, and infinity times an
    advantage of 0 is not a number.

    Args:
        new: [N] log π of the sampled actions; takes the gradient.
        old: [N] log π of the same when the rollout was made, at the same temperature.
        advantages: [N]
        clip_low: ε_low.
        clip_high: ε_high.
        dual_clip: c, or none.

    Returns:
        Loss, clipped and ratio, each [N].
    """
    ratio = torch.exp((new - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss, clipped = torch.maximum(plain, bounded), bounded > plain
    if dual_clip is not None:
        most = -dual_clip * advantages
        over = (advantages < 0) & (loss > most)
        loss, clipped = torch.where(over, most, loss), clipped | over
    return PolicyTerms(loss, clipped.detach(), ratio.detach())


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None
) -> tuple[Tensor, Tensor]:
    """The critic's loss, ½·max((V − R)², (clip(V, V_old ± ε) − R)²) (PPO2, in Huang et al. 2022, detail 9).

    Args:
        values: [N] V before each action; takes the gradient.
        old_values: [N] the same when the rollout was made.
        returns: [N] R.
        clip: ε, or none for ½·(V − R)².

    Returns:
        ([N] loss, [N] bool: the clipped square was the larger).
    """
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    near = torch.clamp(values, old_values - clip, old_values + clip)
    bounded = (near - returns).square()
    return 0.5 * torch.maximum(plain, bounded), (bounded > plain).detach()
