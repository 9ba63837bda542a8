"""The loss on single answers that are desirable or not. r(x, y) = log π(y|x) − log π_ref(y|x)."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_point(mismatched: Tensor, weights: Tensor) -> Tensor:
    """z = max(0, Σ w·r(x, y′) / Σ w), the estimate of KL(π ‖ π_ref) from answers y′ to other prompts.

    Ethayarajh et al. 2024, section 4.1. It carries no gradient.

    Args:
        mismatched: [B] log-ratio r(x, y′) of each prompt of the whole global batch with an answer to another one.
        weights: [B] weight of each.

    Returns:
        Scalar.
    """
    with torch.no_grad():
        return ((weights * mismatched).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)).clamp_min(0.0)


def kto_loss(
    ratios: Tensor,
    desirable: Tensor,
    point: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """KTO (Ethayarajh et al. 2024, eq. 7 and 8), one value per answer.

    L = λ_D·(1 − σ(β·(r − z))) for a desirable answer, λ_U·(1 − σ(β·(z − r))) for an undesirable one

    Args:
        ratios: [B] log-ratio r of the answers.
        desirable: [B] bool.
        point: Reference point z, a scalar.
        beta: Strength β of the pull towards the reference.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.

    Returns:
        [B]
    """
    side = torch.where(desirable, 1.0, -1.0)
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    # 1 − σ(a) = σ(−a), which does not cancel far out.
    return weights * torch.sigmoid(-beta * side * (ratios - point))
