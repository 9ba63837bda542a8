"""Losses on preference pairs. y_w is the chosen response, y_l the rejected one, both to the prompt x."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def log_ratio(policy: Tensor, reference: Tensor) -> Tensor:
    """r(x, y) = log π(y|x) − log π_ref(y|x).

    Args:
        policy: [B] log-probability of each response, summed over its tokens.
        reference: [B] the same under the reference.

    Returns:
        [B]
    """
    return policy - reference


def sigmoid_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7): L = −log σ(β·(r_w − r_l)), one value per pair.

    Args:
        chosen: [B] log-ratio r_w of the chosen responses.
        rejected: [B] log-ratio r_l of the rejected responses.
        beta: Strength β of the pull towards the reference.

    Returns:
        [B]
    """
    return -F.logsigmoid(beta * (chosen - rejected))
