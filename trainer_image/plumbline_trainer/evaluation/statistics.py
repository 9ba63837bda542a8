"""Estimates with intervals, by prompt: cluster bootstrap, and exact intervals where outcomes are binary.

The bootstrap interval is the expanded percentile interval (Hesterberg 2015, The American Statistician 69): percentile
limits at levels widened for the t distribution and for n against n−1, which the plain percentile interval of small
samples lacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 4000
_BLOCK_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval."""

    value: float
    lower: float
    upper: float
    clusters: int
    """Independent units (prompts) that it rests on."""
    method: str
    """`bootstrap` or `exact`."""

    def mapped(self, monotone: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing function of the figure."""
        return Estimate(monotone(self.value), monotone(self.lower), monotone(self.upper), self.clusters, self.method)


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    groups: Sequence[Hashable],
    *,
    confidence: float,
    seed: int,
) -> Estimate:
    """Sum of numerators over sum of denominators, with a cluster bootstrap over groups.

    Args:
        numerators: one per row, such as summed negative log-likelihoods.
        denominators: one per row, such as token counts; none negative, at least one above 0.
        groups: one per row; rows of one group (one prompt) stay together.
        confidence: level of the interval.
        seed: of the resampling.
    """
    tops, bottoms = _by_group(numerators, groups), _by_group(denominators, groups)
    value = float(tops.sum() / bottoms.sum())
    low, high = _bootstrap(tops, bottoms, confidence=confidence, seed=seed)
    return Estimate(value, min(low, value), max(high, value), len(tops), "bootstrap")


def mean(scores: Sequence[float], groups: Sequence[Hashable], *, confidence: float, seed: int) -> Estimate:
    """Mean of scores per row, with a cluster bootstrap over groups."""
    return ratio(scores, [1.0] * len(scores), groups, confidence=confidence, seed=seed)


def share(outcomes: Sequence[float], groups: Sequence[Hashable], *, confidence: float, seed: int) -> Estimate:
    """Mean of outcomes between 0 and 1, where ½ is a tie.

    Without ties, and with one outcome per prompt, the interval is exact (Clopper and Pearson 1934). Where every outcome
    is the same it is exact for the share of that outcome, and takes the worst for the rest. Else it is the bootstrap's.
    """
    independent = len(set(groups)) == len(outcomes)
    n = len(outcomes)
    if independent and len(set(outcomes)) == 1:
        constant, tail = outcomes[0], ((1 - confidence) / 2) ** (1 / n)
        return Estimate(constant, constant * tail, constant * tail + (1 - tail), n, "exact")
    if independent and set(outcomes) <= {0.0, 1.0}:
        low, high = exact_interval(int(sum(outcomes)), n, confidence)
        return Estimate(sum(outcomes) / n, low, high, n, "exact")
    found = mean(outcomes, groups, confidence=confidence, seed=seed)
    return Estimate(found.value, max(0.0, found.lower), min(1.0, found.upper), found.clusters, found.method)


def exact_interval(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """The interval of Clopper and Pearson for a binomial share."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta.ppf(1 - tail, successes + 1, trials - successes))
    return low, high


def sign_test(differences: Sequence[float]) -> float:
    """Two-sided p-value that positive and negative differences are equally likely; ties are left out."""
    from scipy.stats import binomtest

    up, down = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return 1.0 if up + down == 0 else float(binomtest(up, up + down).pvalue)


def _by_group(values: Sequence[float], groups: Sequence[Hashable]) -> Floats:
    """Sums per group, in the order in which groups first appear."""
    places: dict[Hashable, int] = {}
    index = np.array([places.setdefault(group, len(places)) for group in groups], dtype=np.int64)
    return np.bincount(index, weights=np.asarray(values, dtype=np.float64), minlength=len(places)).astype(np.float64)


def _bootstrap(tops: Floats, bottoms: Floats, *, confidence: float, seed: int) -> tuple[float, float]:
    n = len(tops)
    if n < 2:
        return -math.inf, math.inf
    generator = np.random.Generator(np.random.PCG64(seed))
    ratios = np.empty(RESAMPLES)
    step = max(1, _BLOCK_BYTES // (8 * n))
    for start in range(0, RESAMPLES, step):
        stop = min(start + step, RESAMPLES)
        chosen = generator.integers(0, n, size=(stop - start, n))
        ratios[start:stop] = tops[chosen].sum(axis=1) / np.maximum(bottoms[chosen].sum(axis=1), 1e-300)
    tail = expanded_tail(n, confidence)
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def expanded_tail(n: int, confidence: float) -> float:
    """Share of resamples beyond each limit: Φ(−√(n/(n−1))·t_{n−1})."""
    from scipy.stats import norm, t

    return float(norm.cdf(math.sqrt(n / (n - 1)) * t.ppf((1 - confidence) / 2, n - 1)))
