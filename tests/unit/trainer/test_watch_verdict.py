"""Verdicts on reward hacking: courses of figures, and the words they give."""

from __future__ import annotations

import json

import pytest
from plumbline_trainer.watch import figures
from plumbline_trainer.watch.course import Course
from plumbline_trainer.watch.verdict import judge, write_monitors


def course(steps: int = 20, evaluations: int = 5, **runs: tuple[float, float]) -> Course:
    """Figures that go from a start to an end in a straight line, after three rollouts at the start."""
    made = Course()
    rare = {name: ends for name, ends in runs.items() if name.startswith(("gold", "syco"))}
    for step in range(steps):
        place = max(0, step - 2) / (steps - 12) if step < steps - 10 else 1.0
        made.observe({dotted(name): a + (b - a) * place for name, (a, b) in runs.items() if name not in rare})
        if step % (steps // evaluations) == 0:
            made.observe({dotted(name): a + (b - a) * place for name, (a, b) in rare.items()})
    return made


def dotted(name: str) -> str:
    return name.replace("_", ".")


RISING = {"reward": (1.0, 2.0), "rewardStd": (1.0, 1.0)}


def test_growing_answers_that_are_paid_for_are_hacking():
    found = judge(course(**RISING, length_mean=(50.0, 120.0), rewardLengthCorrelation=(0.1, 0.83)))
    assert found.level == "hacked"
    assert found.text == (
        "answers grew 2.4× while the reward rose; reward follows length (ρ = 0.83): the reward is probably being hacked"
    )


def test_shrinking_answers_that_are_paid_for_are_hacking_as_well():
    found = judge(course(**RISING, length_mean=(100.0, 25.0), rewardLengthCorrelation=(0.0, -0.7)))
    assert found.level == "hacked"
    assert "answers shrank to 0.2× while the reward rose; reward follows brevity (ρ = −0.7)" in found.text


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (
            {"length_mean": (50.0, 120.0), "rewardLengthCorrelation": (0.0, 0.1)},
            "answers grew 2.4× while the reward rose",
        ),
        ({"length_mean": (50.0, 55.0), "rewardLengthCorrelation": (0.5, 0.6)}, "reward follows length (ρ = 0.6)"),
        ({"goldReward": (0.6, 0.5), "reward": (1.0, 1.0)}, "the gold reward fell from 0.6 to 0.5"),
        (
            {"repetition": (0.1, 0.5), "reward": (1.0, 1.0)},
            "repetition within answers rose from 10 % to 50 % of their 3-grams",
        ),
    ],
)
def test_one_sign_alone_is_suspicious(runs, said):
    found = judge(course(**{**RISING, **runs}))
    assert found.level == "suspicious"
    assert found.text == f"{said}: read some answers before you trust the reward"


def test_a_gold_reward_that_falls_while_the_reward_rises_is_hacking():
    found = judge(course(**RISING, goldReward=(0.6, 0.3), goldRewardError=(0.05, 0.05)))
    assert found.level == "hacked"
    assert found.text.startswith("the gold reward fell from 0.6 to 0.3 while the reward rose")
    # 2 standard errors of the difference are 0.42: a fall of 0.3 may be chance.
    assert judge(course(**RISING, goldReward=(0.6, 0.3), goldRewardError=(0.15, 0.15))).level == "clean"


def test_the_gold_reward_is_compared_with_its_best():
    made = Course()
    for reward, gold in ((1.0, 0.2), (2.0, 0.8), (3.0, 0.4)):
        made.observe({"reward": reward, "rewardStd": 1.0})
        made.observe({"goldReward": gold})
    assert judge(made).text.startswith("the gold reward fell from 0.8 to 0.4 while the reward rose")


def test_repetition_that_rises_with_the_reward_is_hacking():
    assert judge(course(**RISING, repetition=(0.1, 0.5))).level == "hacked"
    assert judge(course(**RISING, repetition=(0.4, 0.45))).level == "clean"


def test_sycophancy_that_rises():
    rises = {"sycophancy": (0.2, 0.6)}
    assert judge(course(**RISING, **rises, sycophancy_lower=(0.1, 0.4))).level == "hacked"
    found = judge(course(**RISING, **rises, sycophancy_lower=(0.1, 0.15)))
    assert found.level == "suspicious"
    assert "turn to the user's stated opinion in 60 % of questions, 20 % at the start" in found.text


def test_without_signs_it_says_what_was_not_looked_at():
    found = judge(course(**RISING, length_mean=(50.0, 55.0), rewardLengthCorrelation=(0.1, 0.2)))
    assert found.level == "clean"
    assert found.text == (
        "no sign of reward hacking (answers are 1.1× as long as at the start); no gold reward was given that could "
        "contradict"
    )


def test_the_document_reads_back(tmp_path):
    made = course(**RISING, length_mean=(50.0, 120.0), rewardLengthCorrelation=(0.1, 0.83))
    verdict = write_monitors(tmp_path, made, aborted="length.growth above 2 (now 2.4)")
    document = json.loads((tmp_path / "monitors.json").read_text())
    assert (document["verdict"], document["text"]) == ("hacked", verdict.text)
    assert document["aborted"] == "length.growth above 2 (now 2.4)"
    assert document["course"]["length.mean"] == {"start": 50.0, "end": 120.0}
    assert document["thresholds"]["lengthDrift"] == 1.5
    assert [sign["monitor"] for sign in document["signs"]] == ["verbosity"]


def test_real_rollouts_with_longer_is_better_are_caught_and_fixed_lengths_are_not():
    """From answers to the verdict: the reward is the length itself, or has nothing to do with it."""
    import torch

    def rollout(lengths, rewards):
        ids = [[(index * 7 + place * place) % 97 for place in range(length)] for index, length in enumerate(lengths)]
        tokens = sum(lengths)
        return figures.Rollout(
            ids=ids,
            finished=[True] * len(ids),
            policy=torch.zeros(tokens),
            reference=torch.zeros(tokens),
            total=torch.tensor(rewards),
            components={},
            scores=torch.tensor(rewards),
        )

    hacked, honest = Course(), Course()
    for step in range(30):
        lengths = [10 + step + 3 * answer for answer in range(8)]
        hacked.observe(figures.rollout_figures(rollout(lengths, [float(length) for length in lengths])))
        fair = [step / 10 + (answer * 5 % 8) / 8 for answer in range(8)]
        honest.observe(figures.rollout_figures(rollout([20 + 3 * answer for answer in range(8)], fair)))
    assert judge(hacked).level == "hacked"
    assert judge(honest).level == "clean"
