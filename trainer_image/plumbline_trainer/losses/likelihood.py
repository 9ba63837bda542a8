"""Likelihood losses."""

from __future__ import annotations

from torch import Tensor


def negative_log_likelihood(log_probabilities: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of −log p over tokens; divide by the global sum of weights for the mean.

    L = −Σ_t w_t · log π(y_t | x, y_<t)

    Args:
        log_probabilities: [N] log π of each token that carries loss.
        weights: [N] weight of each token.

    Returns:
        Scalar.
    """
    return -(weights * log_probabilities).sum()
