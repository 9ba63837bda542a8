"""Losses of reward models. r is the reward of a response y to the prompt x; B counts rows, k the responses of a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Bradley and Terry 1952, with the margin of Llama 2 (Touvron et al. 2023, eq. 2): L = −log σ(r_w − r_l − m).

    Args:
        chosen: [B] reward r_w of the chosen responses.
        rejected: [B] reward r_l of the rejected responses.
        margin: [B] or a number, by how much m the chosen reward should be higher.

    Returns:
        [B]
    """
    return -F.logsigmoid(chosen - rejected - margin)


def plackett_luce(rewards: Tensor, ranks: Tensor) -> Tensor:
    """Plackett 1975, Luce 1959: L = −Σ_j [r_j − log Σ_{i ∈ W(j)} exp r_i], W(j) = {j} and all that rank below j.

    Without ties it is the negative log-likelihood of drawing the responses best first, each with a probability in
    proportion to exp r among those left; of two responses it is `bradley_terry`. Responses of equal rank are not
    compared with each other.

    Args:
        rewards: [B, k] reward of each response.
        ranks: [B, k] integers, 0 is best.

    Returns:
        [B]
    """
    below = ranks[:, None, :] > ranks[:, :, None]  # [B, j, i]
    compared = below | torch.eye(ranks.shape[1], dtype=torch.bool, device=ranks.device)
    # Selected, not multiplied: exp(−inf) is 0 and takes no gradient.
    others = rewards[:, None, :].expand(compared.shape).masked_fill(~compared, float("-inf"))
    return (torch.logsumexp(others, dim=2) - rewards).sum(dim=1)


def centring(rewards: Tensor) -> Tensor:
    """(Σ_i 2·r_i/k)², of pairs (r_w + r_l)²: rewards far from zero cost (Eisenstein et al. 2023, sec. 2).

    Args:
        rewards: [B, k] reward of each response.

    Returns:
        [B]
    """
    return (2.0 * rewards.mean(dim=1)).square()
