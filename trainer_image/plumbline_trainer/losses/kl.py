"""The KL divergence of the policy from its reference, estimated at sampled tokens, and the controller of its weight.

A token y_t was sampled from the policy π. KL(π ‖ π_ref) is the mean over such tokens of log π(y_t) − log π_ref(y_t).
All divergences are in nats.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]

MAX_PROPORTIONAL_ERROR = 0.2


def kl_estimate(policy: Tensor, reference: Tensor, kind: KlEstimator) -> Tensor:
    """Schulman's estimators of KL(π ‖ π_ref), elementwise (Schulman 2020, "Approximating KL divergence").

    k1 = log π − log π_ref is unbiased, and negative for some tokens; k2 = ½·k1² is biased with low variance;
    k3 = e^{−k1} − 1 + k1 is unbiased and never negative. Those are statements about values, which is what a reward
    needs. As a *loss*, differentiated through `policy`, only k2 has the gradient of KL(π ‖ π_ref) in expectation: that
    of k1 is zero, that of k3 is the gradient of the reversed KL(π_ref ‖ π) (Tang and Munos 2025).

    Args:
        policy: [N] log π of each sampled token (or, for whole answers, of each answer), at the sampling temperature.
        reference: [N] log π_ref of the same, at the same temperature.
        kind: Which estimator.

    Returns:
        [N] nats.
    """
    k1 = policy - reference
    if kind == "k1":
        return k1
    if kind == "k2":
        return 0.5 * k1.square()
    # e^{−k1} − 1 by expm1: the difference of two numbers near 1 would lose every digit of a small divergence.
    return torch.expm1(-k1) + k1


class KlController:
    """The weight β of the KL penalty: fixed, or steered to a target (Ziegler et al. 2019, section 2.2).

    Adaptive: e = clip(KL/target − 1, −0.2, 0.2); β ← β·(1 + e·n/horizon), where KL is the mean over the n answers of
    one rollout of the divergence summed over an answer's tokens.
    """

    def __init__(self, coefficient: float, *, target: float | None = None, horizon: float = 10_000.0) -> None:
        """Start at β = `coefficient`; with a `target` (nats per answer) it adapts, over `horizon` answers."""
        if target is not None and (target <= 0 or horizon <= 0):
            raise ValueError(
                f"The KL target ({target} nats per answer) and horizon ({horizon} answers) must be above 0."
            )
        self.coefficient = coefficient
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, answers: int) -> None:
        """After a rollout of n = `answers` answers with mean divergence `kl` nats per answer."""
        if self.target is None:
            return
        error = min(max(kl / self.target - 1, -MAX_PROPORTIONAL_ERROR), MAX_PROPORTIONAL_ERROR)
        self.coefficient *= 1 + error * answers / self.horizon

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, as JSON."""
        return {"coefficient": self.coefficient}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from a `state()`."""
        self.coefficient = float(state["coefficient"])
