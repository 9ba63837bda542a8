"""The verdict is honest: only what the whole interval says, and never what was trained on."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from plumbline_trainer.report import page, words
from plumbline_trainer.report.curves import draw_curves, smoothed
from plumbline_trainer.report.facts import Point, RunFacts, parse_curve
from plumbline_trainer.report.figures import Finding, Value, _direction
from plumbline_trainer.report.merges import describe_merge


def finding(kind, value, *, before=None, change=None, in_sample=(), policy="final", baseline="base"):
    estimate = Value(*value)
    moved = None if change is None else Value(*change)
    return Finding(
        stage="exam",
        kind=kind,
        metric=kind,
        dataset="questions",
        split="test",
        policy=policy,
        baseline=baseline,
        value=estimate,
        baseline_value=None if before is None else Value(before),
        change=moved,
        direction=_direction(kind, estimate, moved),
        prompts=48,
        confidence=0.95,
        judge="rule “answers in one sentence”" if kind == "winRate" else None,
        in_sample=list(in_sample),
    )


BETTER = finding("winRate", (0.83, 0.76, 0.89))
UNCLEAR = finding("winRate", (0.56, 0.42, 0.69))
WORSE = finding("winRate", (0.3, 0.2, 0.41))
DEARER = finding("perplexity", (14.0, 12, 16), before=12.0, change=(1.17, 1.1, 1.24))
CHEAPER = finding("perplexity", (11.0, 9, 13), before=12.0, change=(0.92, 0.9, 0.95))
NOISY = finding("perplexity", (11.5, 9, 14), before=12.0, change=(0.96, 0.9, 1.03))


class Ended(RunFacts):
    """A run that ended well, whatever its stages."""

    succeeded = True
    failures = []

    def __init__(self):
        self.stages = []


@pytest.mark.parametrize(
    ("findings", "tone", "beginning"),
    [
        ([BETTER, CHEAPER], "good", "It worked. The answers of “final” beat those of the starting model in 83"),
        ([BETTER, DEARER], "open", "It worked. "),
        ([UNCLEAR, CHEAPER], "open", "It worked in part: perplexity got better."),
        ([UNCLEAR, NOISY], "open", "It ran to the end, with no clear effect."),
        ([UNCLEAR, DEARER], "bad", "It did not help: perplexity got worse."),
        ([WORSE, CHEAPER], "bad", "It made things worse."),
        ([CHEAPER], "good", "It worked. The perplexity of “final” is 11.0 (the starting model: 12.0; 95"),
        ([], "open", "It ran to the end, but nothing was measured"),
    ],
)
def test_verdicts(findings, tone, beginning):
    sentence, found = words.verdict(Ended(), findings)
    assert found == tone
    assert sentence.startswith(beginning), sentence


def test_how_it_went_stands_before_what_it_rests_on():
    outcome, evidence = words.first_sentence(words.verdict(Ended(), [BETTER])[0])
    assert outcome == "It worked."
    assert evidence.startswith("The answers of “final” beat those of the starting model in ")
    assert words.first_sentence("It ran to the end, but nothing was measured.") == (
        "It ran to the end, but nothing was measured.",
        "",
    )


def test_a_change_that_is_none_is_called_so():
    assert (
        words.change_text(finding("preferenceAccuracy", (0.8, 0.3, 1), before=0.8, change=(0.0, 0.0, -0.0)))
        == "no change"
    )
    moved = finding("preferenceAccuracy", (0.8, 0.3, 1), before=0.8, change=(0.2, 0.0, 0.5))
    assert words.change_text(moved) == "change +20 points (+0 to +50)"


def test_tokens_are_those_of_the_whole_stage_and_not_of_its_last_attempt():
    resumed = SimpleNamespace(metrics={"tokens": 15900.0}, manifest=SimpleNamespace(tokens=492))
    assert page._tokens(resumed) == 15900
    measured = SimpleNamespace(metrics={}, manifest=SimpleNamespace(tokens=3560))
    assert page._tokens(measured) == 3560


def test_a_price_is_named():
    assert "At a price: perplexity got worse." in words.verdict(Ended(), [BETTER, DEARER])[0]


def test_what_was_trained_on_decides_only_where_nothing_else_does():
    flattering = finding("winRate", (0.9, 0.8, 0.95), in_sample=["dataset"])
    sentence, tone = words.verdict(Ended(), [flattering, NOISY])
    assert tone == "open"
    assert "no clear effect" in sentence
    sentence, tone = words.verdict(Ended(), [flattering])
    assert tone == "open"
    assert "took part in training" in sentence


def test_directions_need_the_whole_interval():
    assert (BETTER.direction, UNCLEAR.direction, WORSE.direction) == ("better", "unclear", "worse")
    assert (CHEAPER.direction, NOISY.direction, DEARER.direction) == ("better", "unclear", "worse")
    # Intervals of the two figures overlap, but the paired change is clear.
    assert finding("preferenceAccuracy", (0.7, 0.5, 0.85), before=0.6, change=(0.1, 0.02, 0.2)).direction == "better"
    assert finding("perplexity", (11.0, 9, 13)).direction == "unclear"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (12, "12"),
        (1234567, "1\u202f234\u202f567"),
        (0.6931, "0.693"),
        (12.34, "12.3"),
        (1e-5, "1.0e-05"),
    ],
)
def test_numbers(value, text):
    assert words.number(value) == text


def test_durations_sizes_and_counts():
    assert [words.duration(s) for s in (4.4, 281, 7300)] == ["4 s", "4 min 41 s", "2 h 1 min"]
    assert [words.size(b) for b in (12, 411_000, 538_000_000)] == ["12 B", "411 kB", "538 MB"]
    assert [words.compact(n) for n in (134_515_008, 1_240_000_000, 950)] == ["135M", "1.2B", "950"]


def test_a_curve_survives_resumes_and_damage():
    lines = [
        b'{"step": 1, "metrics": {"loss": 2.0}}',
        b'{"step": 2, "metrics": {"loss": 9.0}}',
        b'{"step": 2, "metrics": {"loss": 1.5, "evalLoss": 1.7}}',
        b"not json",
        b'{"step": 3, "metrics": {"loss": "high"}}',
        b'{"step": 3, "metr',
    ]
    assert parse_curve(b"\n".join(lines)) == [
        Point(1, {"loss": 2.0}),
        Point(2, {"loss": 1.5, "evalLoss": 1.7}),
        Point(3, {}),
    ]


def test_plots_are_inline_follow_the_page_and_are_told_in_words():
    points = [Point(step, {"loss": 2.0 - step / 100, "rewardAccuracy": 0.6}) for step in range(1, 81)]
    points[0].metrics["evalLoss"] = 2.2
    points[-1].metrics["evalLoss"] = 1.9
    figures = draw_curves("dpo", "dpo", points)
    assert [figure.title for figure in figures] == ["Loss", "Chosen preferred to rejected"]
    first, second = (figure.svg for figure in figures)
    assert first.startswith("<svg aria-hidden")
    assert "var(--blue)" in first
    assert "var(--orange)" in first
    assert not re.search(r"#01020[3-6]|<metadata|<!DOCTYPE|<script", first)
    identifiers = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert not identifiers[0] & identifiers[1]
    assert figures[0].summary == ("Loss: 1.99 at step 1, 1.2 at step 80; on held-out rows 2.2, then 1.9")
    assert draw_curves("dpo", "dpo", points) == figures
    assert draw_curves("sft", "sft", points[:1]) == []
    assert draw_curves("merge", "merge", points) == []
    assert smoothed([1.0, 2.0, 3.0]) == [1.5, 2.0, 2.5]


def merged(parameters, **metrics):
    from types import SimpleNamespace

    stage = SimpleNamespace(record=SimpleNamespace(type="merge", parameters=parameters), metrics=metrics)
    return describe_merge(stage)


def test_a_chains_merge_says_what_rounding_took():
    tone, said = merged({}, lostPart=0.02, logitKl=1e-4, logitDifference=0.5)
    assert tone == "good"
    assert said == (
        "Merging kept 98.0% of every change: 1.0e-04 nats per token between adapter and merged. "
        "No logit moved by more than 0.5."
    )
    assert merged({}, lostPart=0.4, logitKl=0.1)[0] == "bad"
    assert merged({}) is None


def test_a_merge_of_models_says_how_far_it_is_from_each():
    found = {"logitKl": 0.25, "logitKl.left": 0.25, "logitKl.right": 0.125}
    assert merged({"method": "slerp"}, **found, straightTensors=3) == (
        "good",
        "Merging 2 models by slerp: predictions differ by 0.25 from left, 0.125 from right (nats per token). "
        "3 tensors are nearly parallel or zero and were averaged.",
    )
    tone, said = merged({"method": "ties"}, **found, lostPart=0.5, signConflicts=0.25)
    assert tone == "bad"
    assert "At 25\u00a0% of the changed weights they pull in opposite directions." in said
    assert said.endswith("Rounding took 50\u00a0% of the change: set merge.storageDtype to float32.")
