"""Who decides which of two answers wins: rules, and language models asked in both orders."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from plumbline_api.errors import InputError
from plumbline_api.evaluation import ModelJudge, RuleJudge

from plumbline_trainer.data.encode import Encoded, EncodedResponse, tokenize
from plumbline_trainer.data.rows import Message
from plumbline_trainer.data.templates import Renderer
from plumbline_trainer.models.tokenizer import Tokenizer
from plumbline_trainer.patterns import make_search

ANSWER_SHOWN_MAX = 4000
"""Characters of an answer that a judge model is shown; longer ones are cut alike on both sides."""

_ABBREVIATION = re.compile(
    r"\b(?:e\.g|i\.e|etc|vs|cf|approx|no|vol|fig|dr|mr|mrs|ms|prof|st|jr|sr|[a-z])\.$", re.IGNORECASE
)
_BULLET = re.compile(r"^\s*(?:[-*•–]|\(?\d{1,3}[.)]|\(?[a-z][.)])\s+", re.IGNORECASE)
_STOP = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")


@dataclass(frozen=True)
class Question:
    """Two answers to one prompt."""

    row_id: str
    prompt: str
    """The prompt as people read it."""
    policy: str
    baseline: str


@dataclass(frozen=True)
class Verdict:
    """1: the policy wins; 0: the baseline; ½: a tie."""

    outcome: float
    reason: str
    first_preferred: float | None = None
    """Share of the orders in which the answer shown first won; None where order plays no part."""


def count_words(text: str) -> int:
    """Words: what white space separates and that holds a letter or digit."""
    return sum(any(character.isalnum() for character in word) for word in text.split())


def count_sentences(text: str) -> int:
    """Sentences: every line with words has at least one; within a line they end with . ! ? or … before a space.

    Numbers with a point, list markers and common abbreviations end none.
    """
    return sum(_sentences_of_line(line) for line in text.splitlines())


def _sentences_of_line(line: str) -> int:
    line = _BULLET.sub("", line)
    found, start = 0, 0
    for stop in _STOP.finditer(line):
        if _ABBREVIATION.search(line[: stop.end()]) and line[stop.end() :].strip():
            continue
        found += any(character.isalnum() for character in line[start : stop.start()])
        start = stop.end()
    return found + any(character.isalnum() for character in line[start:])


def make_rule(rule: RuleJudge) -> Callable[[str], bool]:
    """A rule as a function of an answer.

    Raises:
        InputError: if the expression of `matches` is none.
    """
    if rule.max_words is not None:
        words = rule.max_words
        return lambda answer: 1 <= count_words(answer) <= words
    if rule.max_sentences is not None:
        sentences = rule.max_sentences
        return lambda answer: 1 <= count_sentences(answer) <= sentences
    assert rule.matches is not None
    return make_search(rule.matches, "judge.rule.matches")


def describe_rule(rule: RuleJudge) -> str:
    """A rule in words."""
    if rule.max_words is not None:
        return f"answers in at most {rule.max_words} word{'s' * (rule.max_words != 1)}"
    if rule.max_sentences is not None:
        one = rule.max_sentences == 1
        return "answers in one sentence" if one else f"answers in at most {rule.max_sentences} sentences"
    return f"answer matches /{rule.matches}/"


def judge_by_rule(rule: RuleJudge, questions: Sequence[Question]) -> list[Verdict]:
    """An answer that fulfils the rule beats one that does not; both or neither is a tie."""
    holds = make_rule(rule)
    verdicts = []
    for question in questions:
        policy, baseline = holds(question.policy), holds(question.baseline)
        if policy == baseline:
            verdicts.append(Verdict(0.5, "both" if policy else "neither"))
        else:
            verdicts.append(Verdict(1.0 if policy else 0.0, "policy" if policy else "baseline"))
    return verdicts


def judge_by_reward(rewards: Sequence[tuple[float, float]]) -> list[Verdict]:
    """The answer with the higher reward wins.

    Args:
        rewards: of the policy's and of the baseline's answer to each question.
    """
    verdicts = []
    for policy, baseline in rewards:
        outcome = 0.5 if policy == baseline else float(policy > baseline)
        verdicts.append(Verdict(outcome, "policy" if outcome > 0.5 else "baseline" if outcome < 0.5 else "equal"))
    return verdicts


Score = Callable[[Sequence[Encoded]], list[list[Any]]]
"""Rows → token log-probabilities of every response, as `engine.scoring.score_rows` gives them."""


def judge_by_model(
    judge: ModelJudge, tokenizer: Tokenizer, score: Score, questions: Sequence[Question], *, max_length: int
) -> list[Verdict]:
    """Ask a model which answer is better, in both orders, and average.

    The model's choice is the likelier of the replies "A" and "B", so that there is no reply to misread.

    Raises:
        InputError: if a question does not fit the judge's context.
    """
    rows: list[Encoded] = []
    for question in questions:
        rows.append(_encode(judge, tokenizer, question, swapped=False))
        rows.append(_encode(judge, tokenizer, question, swapped=True))
    longest = max(len(row.prompt) for row in rows)
    if longest >= max_length:
        raise InputError(
            f"the judge model {judge.source} takes {max_length:,} tokens, a question has {longest:,}. "
            "Lower generation.maxNewTokens or name a judge with a longer context"
        )
    scores = [[float(response.sum()) for response in row] for row in score(rows)]
    verdicts = []
    for position in range(0, len(scores), 2):
        straight, swapped = (_prefers_first(pair) for pair in scores[position : position + 2])
        outcome = (straight + (1.0 - swapped)) / 2
        reason = "policy" if outcome > 0.5 else "baseline" if outcome < 0.5 else "orders disagree"
        verdicts.append(Verdict(outcome, reason, (straight + swapped) / 2))
    return verdicts


def _prefers_first(scores: Sequence[float]) -> float:
    first, second = scores
    return 0.5 if first == second else float(first > second)


def _encode(judge: ModelJudge, tokenizer: Tokenizer, question: Question, *, swapped: bool) -> Encoded:
    first, second = (question.baseline, question.policy) if swapped else (question.policy, question.baseline)
    text = (
        f"{judge.rubric}\n\n"
        f"[Question]\n{question.prompt}\n\n"
        f"[Answer A]\n{first[:ANSWER_SHOWN_MAX]}\n\n"
        f"[Answer B]\n{second[:ANSWER_SHOWN_MAX]}\n\n"
        "Reply with one letter: A if answer A is better, B if answer B is better."
    )
    rendered = Renderer(tokenizer)([Message("user", text)], generate=True, source=f"judge, row {question.row_id}")
    # The plain template ends before the space that its vocabularies hold together with the letter.
    letters = ("A", "B") if tokenizer.template is not None else (" A", " B")
    prompt, *replies = tokenize(tokenizer, [rendered, *letters])
    responses = [EncodedResponse(ids, [True] * len(ids), "completion") for ids in replies]
    return Encoded(question.row_id, question.row_id, prompt, responses)
