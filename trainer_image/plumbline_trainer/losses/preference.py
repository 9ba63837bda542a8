"""Losses on preference pairs. y_w is the chosen response, y_l the rejected one, both to the prompt x.

With a reference, r(x, y) = log π(y|x) − log π_ref(y|x), and Δ = r_w − r_l. Where a loss is length-normalised, r stands
for r̄ = r / |y|, the mean over the response's tokens.
"""

from __future__ import annotations

import math

import torch
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


def sigmoid_loss(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7), with label smoothing the conservative one (Mitchell 2023).

    L = −(1 − ε)·log σ(β·Δ) − ε·log σ(−β·Δ), one value per pair; with ε = 0 plain DPO. On log-probabilities instead of
    log-ratios it is CPO's preference loss (Xu et al. 2024, eq. 3).

    Args:
        chosen: [B] log-ratio r_w of the chosen responses.
        rejected: [B] log-ratio r_l of the rejected responses.
        beta: Strength β of the pull towards the reference.
        label_smoothing: Share ε of pairs whose labels are believed to be swapped.

    Returns:
        [B]
    """
    margin = beta * (chosen - rejected)
    if not label_smoothing:
        return -F.logsigmoid(margin)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def robust_loss(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024): unbiased where a share ε < ½ of the labels is swapped.

    L = (−(1 − ε)·log σ(β·Δ) + ε·log σ(−β·Δ)) / (1 − 2ε); it can be negative. Arguments as for `sigmoid_loss`.

    Returns:
        [B]
    """
    margin = beta * (chosen - rejected)
    plain, swapped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * plain - label_smoothing * swapped) / (1 - 2 * label_smoothing)


def ipo_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17): L = (Δ − 1/(2β))², one value per pair; β is the paper's τ.

    Args:
        chosen: [B] log-ratio of the chosen responses: means r̄_w over tokens, as in the authors' experiments, or sums.
        rejected: [B] the same of the rejected responses.
        beta: Strength β of the regularisation.

    Returns:
        [B]
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def hinge_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """SLiC's hinge on the log-ratios (Zhao et al. 2023; Liu et al. 2023): L = max(0, 1 − β·Δ).

    Arguments as for `sigmoid_loss`.

    Returns:
        [B]
    """
    return torch.relu(1 - beta * (chosen - rejected))


def exo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """EXO on pairs (Ji et al. 2024, eq. 16): reverse KL from the policy's preference q to the smoothed label.

    L = q·(log q − log(1 − ε)) + (1 − q)·(log(1 − q) − log ε) with q = σ(β·Δ); it needs ε > 0. Arguments as for
    `sigmoid_loss`.

    Returns:
        [B]
    """
    margin = beta * (chosen - rejected)
    for_chosen = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
    for_rejected = torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(label_smoothing))
    return for_chosen + for_rejected


def nca_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """NCA on pairs (Chen et al. 2024): raises the chosen response's likelihood, not only the margin.

    L = −log σ(β·r_w) − ½·log σ(−β·r_w) − ½·log σ(−β·r_l). Arguments as for `sigmoid_loss`.

    Returns:
        [B]
    """
    better, worse = beta * chosen, beta * rejected
    return -F.logsigmoid(better) - 0.5 * F.logsigmoid(-better) - 0.5 * F.logsigmoid(-worse)


def apo_zero_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7), for chosen responses that are better than what the policy writes.

    L = 1 − σ(β·r_w) + σ(β·r_l): chosen up, rejected down. Arguments as for `sigmoid_loss`.

    Returns:
        [B]
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """APO-down (D'Oosterlinck et al. 2024, eq. 8), for chosen responses that are worse than what the policy writes.

    L = σ(β·r_w) + 1 − σ(β·Δ): both down, the rejected one further. Arguments as for `sigmoid_loss`.

    Returns:
        [B]
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """SimPO (Meng et al. 2024, eq. 6): L = −log σ(β·(p_w − p_l) − γ), without a reference.

    Args:
        chosen: [B] mean log-probability p_w = log π(y_w|x) / |y_w| of the chosen responses.
        rejected: [B] the same of the rejected responses.
        beta: Scale β of the implicit reward β·p.
        gamma: Margin γ by which the chosen reward should win.

    Returns:
        [B]
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """ORPO's odds-ratio loss (Hong et al. 2024, eq. 7): L = −log σ(log(odds_w / odds_l)), odds = P / (1 − P).

    Args:
        chosen: [B] mean log-probability log P_w = log π(y_w|x) / |y_w| of the chosen responses.
        rejected: [B] the same of the rejected responses.

    Returns:
        [B]
    """
    return -F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(log_probabilities: Tensor) -> Tensor:
    """log(P / (1 − P)) = log P − log(1 − P): finite for every log P < 0.

    Args:
        log_probabilities: [B] log P; values that rounding has brought to 0 count as the float next to it.

    Returns:
        [B]
    """
    below = log_probabilities.clamp_max(-torch.finfo(log_probabilities.dtype).tiny)
    # log(1 − eˣ) without cancellation: near 0 by expm1, far from it by log1p (Mächler 2012).
    near = below > -math.log(2)
    close = torch.log(-torch.expm1(torch.where(near, below, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, below)))
    return below - torch.where(near, close, far)


def ranking_loss(log_probabilities: Tensor, ranks: Tensor) -> Tensor:
    """RRHF's ranking loss over the responses to one prompt (Yuan et al. 2023).

    L = Σ_{i worse than j} max(0, p_i − p_j), one sum over all pairs of different rank; equal ranks ask for nothing.

    Args:
        log_probabilities: [k] mean log-probability p of each response.
        ranks: [k] place of each response, 0 is best.

    Returns:
        Scalar.
    """
    worse = ranks[:, None] > ranks[None, :]
    gaps = log_probabilities[:, None] - log_probabilities[None, :]
    return torch.relu(gaps)[worse].sum()
