"""Figures of a reward model on held-out rows, by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from plumbline_trainer.evaluation.rewards import RewardedRow, correlations, measure_rewards, reliability


def row(
    ranks: list[int], rewards: list[list[float]], *, group: str = "", lengths: list[int] | None = None
) -> RewardedRow:
    return RewardedRow(
        group or str((ranks, rewards)), ranks, np.array(rewards), lengths or list(range(1, len(ranks) + 1))
    )


def test_accuracy_counts_rows_by_their_pairs_and_ties_by_half() -> None:
    rows = [
        row([0, 1], [[2.0], [1.0]]),
        row([0, 1], [[1.0], [1.0]]),
        row([0, 1, 2], [[3.0], [1.0], [2.0]]),  # two of three pairs
        row([0, 1, 1], [[3.0], [1.0], [2.0]]),  # two pairs: equal ranks are none
    ]
    found = measure_rewards(rows, seed=1)
    assert (found.rows, found.pairs) == (4, 7)
    assert found.accuracy.value == pytest.approx((1 + 0.5 + 2 / 3 + 1) / 4)
    assert found.accuracy.clusters == 4
    assert found.accuracy.lower <= found.accuracy.value <= found.accuracy.upper


def test_the_prompt_is_the_unit_of_the_interval() -> None:
    """Fifty rows of one prompt are one observation, and one observation says nothing."""
    same = [row([0, 1], [[1.0], [0.0]], group="p")] * 50
    assert measure_rewards(same, seed=1).accuracy.clusters == 1
    apart = [row([0, 1], [[1.0], [0.0]], group=str(n)) for n in range(50)]
    assert measure_rewards(apart, seed=1).accuracy.lower == pytest.approx(0.025 ** (1 / 50))


def test_calibration_by_hand() -> None:
    # σ(ln 3) = 3/4: right once of two; σ(ln 19) = 0.95: right.
    rows = [row([0, 1], [[gap], [0.0]]) for gap in (math.log(3), -math.log(3), math.log(19))]
    found = measure_rewards(rows, seed=1)
    assert [(item.low, item.high) for item in found.bins] == [(0.75, 0.8), (0.95, 1.0)]
    assert [item.weight for item in found.bins] == pytest.approx([2 / 3, 1 / 3])
    assert [item.confidence for item in found.bins] == pytest.approx([0.75, 0.95])
    assert [item.accuracy for item in found.bins] == [0.5, 1.0]
    assert found.calibration_error == pytest.approx(2 / 3 * 0.25 + 1 / 3 * 0.05)


def test_certainty_has_a_bin() -> None:
    (only,) = reliability([1.0], [1.0], [1.0])
    assert (only.low, only.high, only.accuracy) == (0.95, 1.0, 1.0)


def test_correlations_with_length() -> None:
    assert correlations(np.array([1.0, 2.0, 30.0]), np.array([1.0, 2.0, 3.0]))[1] == pytest.approx(1.0)
    pearson, spearman = correlations(np.array([0.0, 1.0, 0.0, 1.0]), np.array([4.0, 1.0, 3.0, 2.0]))
    assert pearson == pytest.approx(-2 / math.sqrt(5))  # cov −1/2, variances 1/4 and 5/4
    assert spearman == pytest.approx(-2 / math.sqrt(5))
    assert correlations(np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0])) == (None, None)


def test_disagreement_is_that_of_margins() -> None:
    """Heads that differ by a constant agree: it cancels in every comparison."""
    agreed = measure_rewards([row([0, 1], [[1.0, 11.0], [0.0, 10.0]])], seed=1)
    assert agreed.disagreement == pytest.approx(0.0)
    split = measure_rewards([row([0, 1], [[1.0, 3.0], [0.0, 0.0]])], seed=1)
    assert split.disagreement == pytest.approx(1.0)  # margins 1 and 3
    assert measure_rewards([row([0, 1], [[1.0], [0.0]])], seed=1).disagreement is None


def test_documents_are_json() -> None:
    found = measure_rewards([row([0, 1], [[1.0], [0.0]])], seed=1)
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    assert document["accuracy"]["value"] == 1.0
    assert document["length"] == {"pearson": None, "spearman": None}
    assert set(found.metrics()) >= {"accuracy", "accuracy.lower", "accuracy.upper", "calibrationError"}
