"""How good a reward model is on rows that it has not seen: pure figures, no model here."""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plumbline_trainer.evaluation.statistics import Estimate, share

Floats = NDArray[np.float64]

BINS = 10
"""Bins of the reliability curve between ½ and 1."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class RewardedRow:
    """The answers to one prompt and what the reward model thinks of them."""

    group: str
    """Its prompt."""
    ranks: list[int]
    """[k] 0 is best."""
    rewards: Floats
    """[k, heads]"""
    lengths: list[int]
    """[k] tokens of each answer."""

    def pairs(self) -> list[tuple[int, int]]:
        """Indices of every better and worse answer."""
        order = range(len(self.ranks))
        return [(a, b) for a in order for b in order if self.ranks[a] < self.ranks[b]]


@dataclass(frozen=True)
class Bin:
    """Pairs whose predicted probability lies in an interval."""

    low: float
    high: float
    weight: float
    """Share of all pairs."""
    confidence: float
    """Mean predicted probability that the answer with the higher reward is the better one."""
    accuracy: float
    """How often it is."""


@dataclass(frozen=True)
class HeldOutFigures:
    """What was found; rewards are means over the heads."""

    rows: int
    pairs: int
    accuracy: Estimate
    """Share of pairs in which the better answer has the higher reward, each row counting once; ties are halves."""
    calibration_error: float
    """Expected calibration error (Naeini et al. 2015) of σ(r_a − r_b) as the probability that a is better."""
    bins: list[Bin]
    length_pearson: float | None
    """Correlation of reward and length over all answers; None where one of them does not vary."""
    length_spearman: float | None
    disagreement: float | None
    """Mean over pairs of the standard deviation, over heads, of r_w − r_l; None for one head."""

    def metrics(self) -> dict[str, float]:
        """As figures of a stage, the deciding one first."""
        found = {
            "accuracy": self.accuracy.value,
            "accuracy.lower": self.accuracy.lower,
            "accuracy.upper": self.accuracy.upper,
            "calibrationError": self.calibration_error,
            "lengthPearson": self.length_pearson,
            "lengthSpearman": self.length_spearman,
            "disagreement": self.disagreement,
        }
        return {name: value for name, value in found.items() if value is not None}

    def document(self) -> dict[str, Any]:
        """As JSON."""
        limits = {"lower": self.accuracy.lower, "upper": self.accuracy.upper}
        return {
            "rows": self.rows,
            "pairs": self.pairs,
            "accuracy": {
                "value": self.accuracy.value,
                **{name: value if math.isfinite(value) else None for name, value in limits.items()},
                "prompts": self.accuracy.clusters,
                "method": self.accuracy.method,
                "confidence": CONFIDENCE,
            },
            "calibration": {
                "error": self.calibration_error,
                "bins": [
                    {
                        "low": item.low,
                        "high": item.high,
                        "weight": item.weight,
                        "confidence": item.confidence,
                        "accuracy": item.accuracy,
                    }
                    for item in self.bins
                ],
            },
            "length": {"pearson": self.length_pearson, "spearman": self.length_spearman},
            "disagreement": self.disagreement,
        }


def measure_rewards(rows: Sequence[RewardedRow], *, seed: int) -> HeldOutFigures:
    """Figures over held-out rows; at least one.

    Args:
        rows: with at least one ordered pair each.
        seed: of the interval's resampling.
    """
    outcomes: list[float] = []
    confidences: list[float] = []
    rights: list[float] = []
    weights: list[float] = []
    spreads: list[float] = []
    for row in rows:
        means, pairs = row.rewards.mean(axis=1), row.pairs()
        right = [_right(float(means[a] - means[b])) for a, b in pairs]
        outcomes.append(sum(right) / len(pairs))
        confidences += [1.0 / (1.0 + math.exp(-abs(float(means[a] - means[b])))) for a, b in pairs]
        rights += right
        weights += [1.0 / len(pairs) / len(rows)] * len(pairs)
        spreads += [float(np.std(row.rewards[a] - row.rewards[b])) for a, b in pairs]
    bins = reliability(confidences, rights, weights)
    rewards = np.concatenate([row.rewards.mean(axis=1) for row in rows])
    lengths = np.array([length for row in rows for length in row.lengths], dtype=np.float64)
    pearson, spearman = correlations(rewards, lengths)
    return HeldOutFigures(
        rows=len(rows),
        pairs=len(rights),
        accuracy=share(outcomes, [row.group for row in rows], confidence=CONFIDENCE, seed=seed),
        calibration_error=sum(item.weight * abs(item.accuracy - item.confidence) for item in bins),
        bins=bins,
        length_pearson=pearson,
        length_spearman=spearman,
        disagreement=plain.fmean(spreads) if rows[0].rewards.shape[1] > 1 else None,
    )


def reliability(confidences: Sequence[float], rights: Sequence[float], weights: Sequence[float]) -> list[Bin]:
    """Bins of equal width between ½ and 1 that hold something.

    Args:
        confidences: [P] predicted probability that the favoured answer is the better one, at least ½.
        rights: [P] 1 where it is, ½ where neither is favoured.
        weights: [P] summing to 1.
    """
    found = []
    places = [min(int((confidence - 0.5) * 2 * BINS), BINS - 1) for confidence in confidences]
    for number in range(BINS):
        members = [index for index, place in enumerate(places) if place == number]
        if not members:
            continue
        weight = sum(weights[index] for index in members)
        found.append(
            Bin(
                low=0.5 + number / (2 * BINS),
                high=0.5 + (number + 1) / (2 * BINS),
                weight=weight,
                confidence=sum(weights[index] * confidences[index] for index in members) / weight,
                accuracy=sum(weights[index] * rights[index] for index in members) / weight,
            )
        )
    return found


def correlations(rewards: Floats, lengths: Floats) -> tuple[float | None, float | None]:
    """Pearson's and Spearman's correlation; None where one side does not vary."""
    from scipy.stats import pearsonr, spearmanr

    if len(rewards) < 3 or np.ptp(rewards) == 0 or np.ptp(lengths) == 0:
        return None, None
    return float(pearsonr(rewards, lengths).statistic), float(spearmanr(rewards, lengths).statistic)


def _right(gap: float) -> float:
    return 0.5 if gap == 0 else float(gap > 0)
