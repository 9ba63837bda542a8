"""Intervals: coverage, exactness, clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from plumbline_trainer.evaluation import statistics


def covered(samples, truth, interval):
    found = [interval(sample) for sample in samples]
    return sum(e.lower <= truth <= e.upper for e in found) / len(found)


@pytest.fixture
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)


@pytest.mark.parametrize("n", [100, 200])
def test_bootstrap_covers_a_mean_with_ties(fewer_resamples, n):
    generator = np.random.default_rng(5)
    groups = list(range(n))
    samples = [generator.choice([0.0, 0.5, 1.0], p=[0.2, 0.3, 0.5], size=n).tolist() for _ in range(1500)]
    share = covered(samples, 0.65, lambda s: statistics.share(s, groups, confidence=0.95, seed=1))
    assert 0.93 <= share <= 0.97


def test_bootstrap_covers_perplexity_weighted_by_tokens(fewer_resamples):
    generator = np.random.default_rng(7)
    n, samples = 120, []
    for _ in range(1500):
        tokens = generator.integers(5, 80, size=n).astype(float)
        samples.append(((2.0 + generator.normal(0, 0.6, size=n)) * tokens, tokens))
    share = covered(samples, 2.0, lambda s: statistics.ratio(s[0], s[1], list(range(n)), confidence=0.95, seed=1))
    assert 0.93 <= share <= 0.97


def test_bootstrap_covers_clusters_where_rows_alone_would_not(fewer_resamples):
    generator = np.random.default_rng(11)
    prompts, rows = 100, 4
    groups = [g for g in range(prompts) for _ in range(rows)]
    samples = [
        (np.repeat(generator.normal(0, 1, prompts), rows) + generator.normal(0, 0.3, prompts * rows)).tolist()
        for _ in range(700)
    ]
    by_prompt = covered(samples, 0.0, lambda s: statistics.mean(s, groups, confidence=0.95, seed=1))
    by_row = covered(samples[:150], 0.0, lambda s: statistics.mean(s, list(range(len(s))), confidence=0.95, seed=1))
    assert 0.93 <= by_prompt <= 0.97
    assert by_row < 0.8


@pytest.mark.parametrize(("n", "p"), [(24, 0.7), (100, 0.5), (100, 0.95)])
def test_exact_intervals_cover_at_least_their_level(n, p):
    generator = np.random.default_rng(3)
    cache = {k: statistics.exact_interval(k, n, 0.95) for k in range(n + 1)}
    counts = generator.binomial(n, p, size=4000)
    assert sum(cache[k][0] <= p <= cache[k][1] for k in counts) / len(counts) >= 0.95 - 0.005


def test_exact_interval_is_the_textbook_one():
    # Clopper & Pearson for 7 of 10 at 95 %.
    assert statistics.exact_interval(7, 10, 0.95) == (
        pytest.approx(0.347547, abs=1e-6),
        pytest.approx(0.933261, abs=1e-6),
    )
    assert statistics.exact_interval(0, 10, 0.95)[0] == 0
    assert statistics.exact_interval(10, 10, 0.95)[1] == 1


def test_binary_outcomes_without_ties_are_exact_and_equal_outcomes_keep_a_width():
    exact = statistics.share([1.0] * 7 + [0.0] * 3, list(range(10)), confidence=0.95, seed=0)
    assert exact.method == "exact"
    assert (exact.lower, exact.upper) == statistics.exact_interval(7, 10, 0.95)
    wins = statistics.share([1.0] * 24, list(range(24)), confidence=0.95, seed=0)
    assert (wins.lower, wins.upper) == pytest.approx(statistics.exact_interval(24, 24, 0.95))
    ties = statistics.share([0.5] * 24, list(range(24)), confidence=0.95, seed=0)
    assert ties.lower < 0.5 < ties.upper
    assert ties.lower == pytest.approx(1 - ties.upper)


def test_rows_of_one_prompt_are_one_unit():
    twice = statistics.share([1.0, 1.0, 0.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b", "c", "c"], confidence=0.9, seed=0)
    assert twice.clusters == 3
    assert twice.method == "bootstrap"


def test_ratio_weights_by_denominator_and_holds_its_value():
    found = statistics.ratio([10.0, 2.0], [10.0, 1.0], ["a", "b"], confidence=0.95, seed=0)
    assert found.value == pytest.approx(12 / 11)
    assert found.lower <= found.value <= found.upper
    alone = statistics.ratio([10.0], [5.0], ["a"], confidence=0.95, seed=0)
    assert alone.value == 2
    assert math.isinf(alone.lower)
    assert math.isinf(alone.upper)


def test_intervals_are_a_function_of_the_seed():
    values = np.random.default_rng(0).normal(size=50).tolist()
    first, again, other = (statistics.mean(values, list(range(50)), confidence=0.95, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_sign_test_leaves_ties_out():
    assert statistics.sign_test([1, 1, 1, 0, 0, -1]) == pytest.approx(0.625)
    assert statistics.sign_test([0, 0]) == 1
