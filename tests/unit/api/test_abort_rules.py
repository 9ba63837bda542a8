"""Abort rules are refused where nothing would ever measure their figure."""

from __future__ import annotations

from typing import Any

import pytest
from plumbline_api.check import check
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.resolve import resolve
from plumbline_api.watched import FIGURES
from support.pipelines import pipeline_body

REWARDS = [{"rule": "length", "weight": 0.1}, {"rule": "repetition", "weight": -1}]
GOLD = [*REWARDS, {"rule": "keywords", "keywords": ["sorry"], "gold": True}]
PROMPTS = {"name": "asks", "source": "s3://corpus/asks.jsonl", "format": "prompt"}
HELD_OUT = {**PROMPTS, "split": {"evaluation": 0.1}}
OFTEN = {"evaluateEverySteps": 10}


def body(*rules: dict[str, Any], dataset: dict[str, Any] = PROMPTS, on_abort: str | None = None, **stage: Any) -> Any:
    common: dict[str, Any] = {"name": "rl", "abortWhen": list(rules)}
    if on_abort is not None:
        common["onAbort"] = on_abort
    grpo = {"prompts": "asks", "rewards": REWARDS, **stage}
    return pipeline_body(datasets=[dataset], stages=[{**common, "grpo": grpo}])


def problems(*rules: dict[str, Any], **given: Any) -> list[str]:
    pipeline = AlignmentPipeline.parse(body(*rules, **given))
    return [str(problem) for problem in check(pipeline, place="cluster")]


@pytest.mark.parametrize(
    ("rule", "given", "said"),
    [
        ({"metric": "kll", "above": 1}, {}, 'this stage has no figure "kll". Did you mean kl?'),
        ({"metric": "length", "above": 1}, {}, 'no figure "length". Did you mean length.growth or length.mean?'),
        ({"metric": "reward.lenght", "above": 1}, {}, "Did you mean reward.length?"),
        ({"metric": "nonsense", "above": 1}, {}, "There are: reward, kl, length.growth,"),
        ({"metric": "valueExplainedVariance", "below": 0}, {}, "this stage has no figure"),
        ({"metric": "sycophancy", "above": 0.5}, {}, "set sycophancy: {} for the probe"),
        ({"metric": "goldReward", "below": 0}, {}, "no reward of this stage has gold: true"),
        (
            {"metric": "reward.keywords", "below": 0},
            {"rewards": GOLD},
            "is a gold reward, which is not scored in training. Did you mean goldReward?",
        ),
        (
            {"metric": "goldReward", "fallsWhile": "reward"},
            {"rewards": GOLD, "training": OFTEN},
            'measured on held-out prompts, and "asks" has no evaluation split. '
            "Set spec.datasets[0].split.evaluation (such as 0.1)",
        ),
        (
            {"metric": "goldReward", "fallsWhile": "reward"},
            {"rewards": GOLD, "dataset": HELD_OUT},
            "Set spec.stages[0].grpo.training.evaluateEverySteps (such as 10)",
        ),
    ],
)
def test_a_rule_on_what_nobody_measures_is_refused(rule: dict[str, Any], given: dict[str, Any], said: str) -> None:
    found = problems(rule, **given)
    assert len(found) == 1
    assert found[0].startswith("spec.stages[0].abortWhen[0].metric: ")
    assert said in found[0]


def test_the_other_figure_is_checked_as_well() -> None:
    found = problems({"metric": "kl", "fallsWhile": "rewards"})
    assert found == ['spec.stages[0].abortWhen[0].fallsWhile: this stage has no figure "rewards". Did you mean reward?']


def test_rules_that_fit() -> None:
    rules = (
        {"metric": "kl", "above": 15, "for": 5},
        {"metric": "reward.length", "above": 200},
        {"metric": "goldReward", "fallsWhile": "reward", "for": 3},
        {"metric": "sycophancy", "above": 0.5},
    )
    given = {"rewards": GOLD, "dataset": HELD_OUT, "training": OFTEN, "sycophancy": {}}
    assert problems(*rules, **given) == []


def test_on_abort_needs_rules_and_a_stage_that_is_watched() -> None:
    assert problems(on_abort="continue") == [
        "spec.stages[0].onAbort: without abortWhen nothing aborts the stage; leave it out, or add rules"
    ]
    merged = pipeline_body(datasets=[], stages=[{"name": "m", "onAbort": "continue", "merge": {}}])
    found = [str(problem) for problem in check(AlignmentPipeline.parse(merged), place="cluster")]
    assert found == ["spec.stages[0].onAbort: merge is not watched; leave it out"]


@pytest.mark.parametrize(("on_abort", "bound"), [(None, 0.0), ("fail", 0.0), ("continue", 1.0)])
def test_an_aborted_output_passes_a_gate_of_its_own(on_abort: str | None, bound: float) -> None:
    pipeline = AlignmentPipeline.parse(body({"metric": "kl", "above": 15}, on_abort=on_abort))
    stage = resolve(pipeline, None, operator_version="1", place="cluster").stages[0]
    assert [gate.to_wire() for gate in stage.gates] == [{"metric": "aborted", "atMost": bound}]
    assert stage.parameters["abortWhen"] == [{"metric": "kl", "above": 15.0, "for": 1}]


def test_every_figure_is_explained() -> None:
    assert all(words and not words.endswith(".") for words in FIGURES.values())
