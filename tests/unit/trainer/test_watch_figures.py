"""Figures of a rollout: numbers worked by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from plumbline_api.online import Grpo, Ppo
from plumbline_api.watched import FIGURES, HEADLINES, by_importance, figures_of, needs_held_out
from plumbline_trainer.watch import figures
from plumbline_trainer.watch.course import RECENT, Course


def rollout(**changes):
    """Two answers: 5 tokens that repeat themselves without an end, and 2 tokens with one."""
    whole = figures.Rollout(
        ids=[[1, 2, 1, 2, 1], [3, 0]],
        finished=[False, True],
        policy=torch.tensor([-1.0, -2.0, -1.0, -2.0, -1.0, -0.5, -0.5]),
        reference=torch.tensor([-1.5, -2.0, -1.5, -2.5, -1.0, -1.5, -0.25]),
        total=torch.tensor([2.0, 4.0]),
        components={"length": torch.tensor([5.0, 2.0])},
        scores=torch.tensor([1.0, 4.0]),
        entropies=torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1.5]),
    )
    return dataclasses.replace(whole, **changes)


def test_a_rollout_by_hand():
    found = figures.rollout_figures(rollout())
    assert found == pytest.approx(
        {
            "reward": 3.0,
            "score": 2.5,
            "rewardStd": 1.0,
            "reward.length": 3.5,
            "length.mean": 3.5,
            "missingEnd": 0.5,
            # 121 212 121: two of three are different; the short answer has no 3-gram.
            "repetition": (1 / 3 + 0) / 2,
            "distinct1": 4 / 7,
            # 12 21 12 21, 30: three of five.
            "distinct2": 3 / 5,
            # 0.5 + 0 + 0.5 + 0.5 + 0, and 1 − 0.25.
            "kl": (1.5 + 0.75) / 2,
            "klPerToken": 2.25 / 7,
            "entropy": 1.0,
        }
    )


def test_every_figure_has_a_name_that_people_can_look_up():
    stage = Ppo.model_validate({"prompts": "p", "rewards": [{"rule": "length"}, {"rule": "repetition", "gold": True}]})
    known = figures_of(stage)
    held_out = figures.held_out_figures(
        total=torch.ones(4), gold=torch.ones(4), lengths=[1] * 4, finished=[True] * 4, prompts=["a", "a", "b", "c"]
    )
    measured = {
        **Course().observe(figures.rollout_figures(rollout())),
        **figures.critic_figures(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])),
        **figures.time_shares(generating=1, scoring=1, training=1),
        **held_out,
    }
    assert set(measured) <= set(known)
    assert "reward.length" in known
    assert "reward.repetition" not in known
    assert "sycophancy" not in known


def test_what_a_stage_does_not_have_it_does_not_measure():
    stage = Grpo.model_validate({"prompts": "p", "rewards": [{"rule": "length"}], "sycophancy": {}})
    known = figures_of(stage)
    assert not {"valueExplainedVariance", "goldReward"} & set(known)
    assert "sycophancy" in known
    assert needs_held_out("evalReward")
    assert not needs_held_out("sycophancy")


def test_without_reference_or_entropies_their_figures_are_missing():
    found = figures.rollout_figures(rollout(reference=None, entropies=None))
    assert not {"kl", "klPerToken", "entropy"} & set(found)


def test_a_rollout_whose_parts_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="7 tokens has parts of"):
        figures.rollout_figures(rollout(policy=torch.zeros(6)))
    with pytest.raises(ValueError, match="2 answers has parts of"):
        figures.rollout_figures(rollout(scores=torch.zeros(3)))


def test_rank_correlation_by_hand():
    # Ranks 1 2 3 4 and 2 1 3 4: ρ = 1 − 6·(1 + 1)/(4·15).
    assert figures.spearman([10, 20, 30, 40], [7, 5, 8, 9]) == pytest.approx(0.8)
    # Ties share their ranks: 1.5 1.5 3 against 1 2 3; covariance 1.5, variances 1.5 and 2.
    assert figures.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert figures.spearman([1, 1, 1], [1, 2, 3]) is None
    assert figures.spearman([1, 2], [1, 2]) is None


def test_explained_variance_by_hand():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert figures.critic_figures(returns + 7, returns)["valueExplainedVariance"] == pytest.approx(1.0)
    assert figures.critic_figures(torch.zeros(4), returns)["valueExplainedVariance"] == pytest.approx(0.0)
    # Errors −1, 1, −1, 1 have variance 1, the returns 1.25.
    found = figures.critic_figures(torch.tensor([2.0, 1.0, 4.0, 3.0]), returns)
    assert found["valueExplainedVariance"] == pytest.approx(1 - 1 / 1.25)
    assert figures.critic_figures(torch.zeros(3), torch.ones(3)) == {}


def test_time_shares_add_up():
    found = figures.time_shares(generating=6.0, scoring=1.5, training=2.5)
    assert found == pytest.approx({"timeGenerating": 0.6, "timeScoring": 0.15, "timeTraining": 0.25})


def test_held_out_errors_are_over_prompts():
    found = figures.held_out_figures(
        total=torch.tensor([0.0, 0.0, 1.0, 1.0]),
        gold=None,
        lengths=[2, 4, 6, 8],
        finished=[True, True, False, True],
        prompts=["a", "a", "b", "b"],
    )
    # Two prompts with means 0 and 1: their standard deviation (n − 1) is √½, divided by √2.
    assert found == pytest.approx(
        {"evalReward": 0.5, "evalRewardError": 0.5, "evalLength": 5.0, "evalMissingEnd": 0.25}
    )


def test_figures_that_matter_stand_in_front():
    shuffled = {"timeTraining": 0.1, "other": 1.0, "score": 1.0, "goldReward": 0.5, "kl": 2.0, "reward": 3.0}
    assert list(by_importance(shuffled)) == ["reward", "kl", "goldReward", "score", "timeTraining", "other"]
    assert set(HEADLINES) <= set(FIGURES)


def test_course_compares_with_the_first_three_rollouts():
    course = Course()
    growth = [course.observe({"length.mean": length})["length.growth"] for length in (10.0, 20.0, 30.0, 40.0)]
    # Means so far: 10, 15, 20, and then always 20.
    assert growth == pytest.approx([1.0, 20 / 15, 30 / 20, 40 / 20])
    assert (course.start("length.mean"), course.end("length.mean")) == (20.0, 40.0)
    for _ in range(RECENT):
        course.observe({"length.mean": 50.0})
    assert course.end("length.mean") == 50.0
    assert course.start("reward") is None


def test_course_keeps_the_best_evaluation():
    course = Course()
    for reward, gold in ((1.0, 0.2), (2.0, 0.6), (3.0, 0.4)):
        course.observe({"reward": reward})
        course.observe({"goldReward": gold, "goldRewardError": 0.01})
    assert course.peak == pytest.approx({"goldReward": 0.6, "goldRewardError": 0.01, "reward": 2.0})
    assert (course.start("goldReward"), course.end("goldReward")) == (0.2, 0.4)


def test_course_is_restored_exactly():
    course, again = Course(), Course()
    for number in range(7):
        course.observe({"reward": number / 3, "length.mean": 10 + number / 7, "goldReward": number / 9})
        again = Course()
        again.restore(json.loads(json.dumps(course.state(), allow_nan=False)))
        assert again.state() == course.state()
    measured = {"reward": 0.1, "length.mean": 20 / 3}
    assert again.observe(measured) == course.observe(measured)
