"""Stop rules: windows counted by hand, words, exact resume."""

from __future__ import annotations

import json
import math

import pytest
from plumbline_api.online import AbortRule
from plumbline_trainer.watch.abort import AbortWatch


def watch(*rules):
    return AbortWatch([AbortRule.model_validate(rule) for rule in rules])


def told(watched, name, values):
    """After each value: whether the window has begun, and the reason."""
    found = []
    for value in values:
        watched.observe({name: value})
        found.append((watched.violated, watched.reason))
    return found


def test_above_for_a_window():
    watched = watch({"metric": "kl", "above": 15, "for": 3})
    assert told(watched, "kl", [15.0, 16.0, 14.0, 16.0, 17.0, 17.21]) == [
        (False, None),
        (True, None),
        (False, None),
        (True, None),
        (True, None),
        (True, "kl above 15 for 3 steps (now 17.2)"),
    ]


def test_below_at_once():
    watched = watch({"metric": "entropy", "below": 0.25})
    assert told(watched, "entropy", [0.25, 0.2]) == [(False, None), (True, "entropy below 0.25 (now 0.2)")]


def test_both_bounds_of_one_rule():
    watched = watch({"metric": "length.growth", "above": 2, "below": 0.5, "for": 2})
    assert told(watched, "length.growth", [2.5, 0.4])[-1] == (True, "length.growth below 0.5 for 2 steps (now 0.4)")


def test_a_step_that_does_not_measure_the_figure_is_no_observation():
    watched = watch({"metric": "kl", "above": 1, "for": 2})
    watched.observe({"kl": 2.0})
    watched.observe({"reward": 1.0})
    watched.observe({"kl": math.nan})
    assert watched.violated
    assert watched.reason is None
    watched.observe({"kl": 2.0})
    assert watched.reason == "kl above 1 for 2 steps (now 2)"


def test_the_first_full_rule_gives_the_reason():
    watched = watch({"metric": "kl", "above": 1, "for": 2}, {"metric": "entropy", "below": 1})
    watched.observe({"kl": 2.0, "entropy": 0.5})
    assert watched.reason == "entropy below 1 (now 0.5)"
    watched.observe({"kl": 2.0, "entropy": 0.5})
    assert watched.reason == "kl above 1 for 2 steps (now 2)"


def fall(window):
    return watch({"metric": "goldReward", "fallsWhile": "reward", "for": window})


def course(watched, gold, rewards):
    """A reward at every step; a gold reward after each pair of steps. What the rule says after each evaluation."""
    found = []
    for index, value in enumerate(gold):
        for reward in rewards[2 * index : 2 * index + 2]:
            watched.observe({"reward": reward})
        watched.observe({"goldReward": value})
        found.append((watched.violated, watched.reason))
    return found


def test_falls_while_the_other_rises():
    # Means of the reward between evaluations: 1, 2, 3.
    found = course(fall(2), gold=[0.6, 0.5, 0.4], rewards=[0.5, 1.5, 1.0, 3.0, 2.0, 4.0])
    reason = "goldReward falls while reward rises for 2 evaluations (0.6 → 0.4, reward 1 → 3)"
    assert found == [(False, None), (True, None), (True, reason)]


def test_a_bump_within_the_window_does_not_matter_while_it_stays_below_the_start():
    # 0.45 is above 0.4, but still below 0.6, where the window began.
    found = course(fall(3), gold=[0.6, 0.4, 0.45, 0.5], rewards=[1, 1, 2, 2, 3, 3, 2, 2])
    assert [reason is not None for _, reason in found] == [False, False, False, True]


def test_back_above_the_start_the_window_ends():
    found = course(fall(3), gold=[0.6, 0.4, 0.7, 0.5], rewards=[1, 1, 2, 2, 3, 3, 4, 4])
    assert [violated for violated, _ in found] == [False, True, False, True]
    assert all(reason is None for _, reason in found)


def test_a_falling_reward_is_no_hacking():
    assert course(fall(1), gold=[0.6, 0.4], rewards=[2, 2, 1, 1]) == [(False, None), (False, None)]


def test_both_figures_in_one_evaluation():
    watched = watch({"metric": "goldReward", "fallsWhile": "evalReward"})
    watched.observe({"goldReward": 0.5, "evalReward": 1.0})
    watched.observe({"goldReward": 0.4, "evalReward": 1.25})
    assert watched.reason == "goldReward falls while evalReward rises (0.5 → 0.4, evalReward 1 → 1.25)"


def test_before_the_other_figure_is_measured_there_is_no_observation():
    watched = fall(1)
    watched.observe({"goldReward": 0.9})  # before the first step
    watched.observe({"reward": 1.0})
    watched.observe({"goldReward": 0.5})
    assert not watched.violated


def test_good_weights_are_those_that_every_rule_has_looked_at():
    watched = watch({"metric": "kl", "above": 1, "for": 2}, {"metric": "goldReward", "below": 0.1})
    watched.observe({"kl": 0.5})
    assert not watched.good  # nobody has looked at the gold reward yet
    watched.observe({"goldReward": 0.5})
    assert watched.good
    watched.observe({"kl": 2.0})
    assert not watched.good
    steps_only = watch({"metric": "kl", "above": 1, "for": 2})
    steps_only.observe({"kl": 0.5})
    assert steps_only.good


@pytest.mark.parametrize("stop", range(6))
def test_restored_anywhere_it_says_the_same(stop):
    rules = (
        {"metric": "kl", "above": 0.1, "for": 4},
        {"metric": "goldReward", "fallsWhile": "reward", "for": 2},
        {"metric": "entropy", "below": 0.0},
    )
    steps = [
        {"kl": 0.1, "reward": 1 / 3},
        {"kl": math.inf, "reward": 2 / 3, "goldReward": 0.9},
        {"kl": 0.3, "reward": 0.7, "goldReward": 0.8},
        {"kl": 0.3, "reward": 0.9},
        {"kl": 0.3, "reward": 0.8, "goldReward": 0.7},
        {"kl": 0.0, "entropy": 0.1},
    ]
    whole, part = watch(*rules), watch(*rules)
    for figures in steps[:stop]:
        whole.observe(figures)
        part.observe(figures)
    resumed = watch(*rules)
    resumed.restore(json.loads(json.dumps(part.state(), allow_nan=False)))
    for figures in steps[stop:]:
        whole.observe(figures)
        resumed.observe(figures)
        assert (resumed.violated, resumed.good, resumed.reason) == (whole.violated, whole.good, whole.reason)
    assert resumed.state() == whole.state()


def test_a_state_of_other_rules_is_refused():
    with pytest.raises(ValueError, match="of 1 abort rules; there are 2"):
        watch({"metric": "kl", "above": 1}, {"metric": "kl", "below": 0}).restore(
            watch({"metric": "kl", "above": 1}).state()
        )


def test_a_long_window_stays_fast():
    watched = fall(10000)
    for number in range(300):
        watched.observe({"goldReward": -float(number), "reward": float(number)})
    assert watched.violated
    assert watched.reason is None
