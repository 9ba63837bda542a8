"""From scores to advantages: how much better each action of an answer was than expected.

An answer is T actions (its tokens, the end token included where the answer ended). r_t is the reward of action t and
V_t the critic's value before it; V after the last action is 0. Answers differ in length, so there is no padding here:
one answer is [T], the tokens of a whole rollout are [N] end to end. Everything is float32 and carries no gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from scipy.signal import lfilter
from torch import Tensor

AdvantageScale = Literal["group", "batch", "none"]

STD_OFFSET = 1e-4
"""Added to a standard deviation that advantages are divided by, as in GRPO's reference implementations."""
VARIANCE_OFFSET = 1e-8
"""Added to the variance of what is whitened."""


def penalise_unfinished(scores: Tensor, finished: Tensor, *, penalty: float) -> Tensor:
    """Subtract `penalty` from the scores of answers without an end token (Huang et al. 2024, the EOS trick).

    Args:
        scores: [n] score of each answer.
        finished: [n] bool, the answer ends with an end token.
        penalty: Positive number.

    Returns:
        [n]
    """
    return torch.where(finished, scores, scores - penalty)


def clip_rewards(scores: Tensor, *, bound: float) -> Tensor:
    """Keep scores within ±bound.

    Args:
        scores: [n]
        bound: Positive number.

    Returns:
        [n]
    """
    return scores.clamp(-bound, bound)


def token_rewards(kl: Tensor, score: float, coefficient: float) -> Tensor:
    """r_t = −β·KL_t, plus the answer's score at its last action (Ziegler et al. 2019, eq. 2, spread over tokens).

    Args:
        kl: [T] estimate of the divergence at each token of one answer, nats.
        score: Score of the answer.
        coefficient: β.

    Returns:
        [T]
    """
    rewards = -coefficient * kl
    rewards[-1] += score
    return rewards


def discounted_sums(rewards: Tensor, gamma: float) -> Tensor:
    """The return-to-go G_t = r_t + γ·G_{t+1} of one answer.

    With γ = 1 and rewards of `token_rewards` it is the advantage of REINFORCE++ (Hu et al. 2025) before whitening,
    A_t = score − β·Σ_{i≥t} KL_i. The baseline variant takes scores from which the group's mean has been subtracted
    (`group_advantages` with scale none). Both are then whitened over the rollout.

    Args:
        rewards: [T] reward of each token of one answer.
        gamma: Discount γ.

    Returns:
        [T]
    """
    if not gamma:
        return rewards.clone()
    # G reversed in time is the linear recursive filter g_t = x_t + γ·g_{t−1}: one call in place of T small ones.
    backwards = rewards.detach().double().cpu().numpy()[::-1]
    sums = lfilter([1.0], [1.0, -gamma], backwards)[::-1].copy()
    return torch.from_numpy(sums).to(rewards)


def gae(rewards: Tensor, values: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation of one answer (Schulman et al. 2016, eq. 16).

    δ_t = r_t + γ·V_{t+1} − V_t with V_T = 0; A_t = δ_t + γλ·A_{t+1}; returns R_t = A_t + V_t.

    Args:
        rewards: [T] reward of each action.
        values: [T] V_t before each action.
        gamma: Discount γ.
        lam: λ: 0 is one-step bootstrapping, 1 the return less V_t.

    Returns:
        ([T] advantages, [T] returns).
    """
    following = torch.cat([values[1:], values.new_zeros(1)])
    advantages = discounted_sums(rewards + gamma * following - values, gamma * lam)
    return advantages, advantages + values


def whiten(flat: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(x − mean)/√(var + 1e-8), with the unbiased variance, over the tokens of a whole rollout.

    Call it on everything that the rollout sampled, never on one rank's or one mini-batch's share: those have means of
    their own, and a step would depend on how the work was divided.

    Args:
        flat: [N]
        shift_mean: Without, the mean is added back: the values are scaled, not centred (for rewards).

    Returns:
        [N]
    """
    mean = flat.mean()
    # One value has no variance of its own.
    variance = flat.var() if len(flat) > 1 else flat.new_zeros(())
    whitened = (flat - mean) * torch.rsqrt(variance + VARIANCE_OFFSET)
    return whitened if shift_mean else whitened + mean


def group_advantages(rewards: Tensor, *, scale: AdvantageScale, std: Tensor | float | None = None) -> Tensor:
    """GRPO's advantages of the answers to one prompt (Shao et al. 2024, section 4.1.2).

    A_i = (R_i − mean R)/(std R + 1e-4)

    Args:
        rewards: [n] reward of each answer to the prompt.
        scale: `group` divides by the group's own standard deviation (unbiased); `batch` by `std`, that of all rewards
            of the rollout (Lite PPO, Liu et al. 2025a); `none` by nothing (Dr. GRPO, Liu et al. 2025b).
        std: For `batch` only.

    Returns:
        [n]
    """
    if (scale == "batch") != (std is not None):
        raise ValueError("std belongs to scale batch, and to no other.")
    centred = rewards - rewards.mean()
    if scale == "none":
        return centred
    if scale == "batch":
        assert std is not None
        return centred / (std + STD_OFFSET)
    if len(rewards) < 2:
        raise ValueError("A group needs 2 answers or more: one has no standard deviation.")
    return centred / (rewards.std() + STD_OFFSET)


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO's advantages of the answers to one prompt (Kool et al. 2019; Ahmadian et al. 2024).

    A_i = R_i − 1/(n − 1)·Σ_{j≠i} R_j

    Args:
        rewards: [n] reward of each answer, the KL penalty of the whole answer included.

    Returns:
        [n]
    """
    if len(rewards) < 2:
        raise ValueError("Leaving one out needs 2 answers or more to a prompt.")
    return rewards - (rewards.sum() - rewards) / (len(rewards) - 1)
