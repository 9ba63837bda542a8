"""Rules on the text of an answer: verifiable rewards that no model has to learn."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from plumbline_api.online import Reward

from plumbline_trainer.errors import InputError
from plumbline_trainer.patterns import make_search
from plumbline_trainer.rewards.interface import Candidate
from plumbline_trainer.rewards.schemas import make_fit

if TYPE_CHECKING:
    from torch import Tensor

    from plumbline_trainer.engine.distributed import Ranks

Rule = Callable[[Candidate], float]

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+|[^\w\s]")
"""Words and signs; of scripts that put no space between words, each character."""
_SIGN = r"(?:(?<![\w.)])[-−])?"
_NUMBER = re.compile(rf"{_SIGN}(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|{_SIGN}(?<![\d.])\.\d+")
"""A minus belongs to a number unless it stands between two: 3-5 holds 3 and 5."""
_CLOSE = 1e-6
"""Relative distance at which two numbers count as equal: 0.3333333 is a third."""


class RuleReward:
    """One rule, applied to answer by answer; every rank does all of them, because they cost next to nothing."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def score(self, candidates: Sequence[Candidate], ranks: Ranks) -> Tensor:
        """[candidates] float32."""
        import torch

        return torch.tensor([self._rule(candidate) for candidate in candidates], dtype=torch.float32)


def make_rule(reward: Reward, place: str) -> Rule:
    """The rule of a reward as a function.

    Args:
        reward: with its rule set.
        place: field path of the reward, for messages.

    Raises:
        InputError: if the JSON schema is none.
    """
    if reward.rule == "length":
        return lambda candidate: float(candidate.tokens)
    if reward.rule == "repetition":
        return lambda candidate: repeated_share(candidate.answer)
    if reward.rule == "matches":
        assert reward.pattern is not None
        holds = make_search(reward.pattern, f"{place}.pattern")
        return lambda candidate: float(holds(candidate.answer))
    if reward.rule == "keywords":
        wanted = [word.casefold() for word in reward.keywords or []]
        return lambda candidate: sum(word in candidate.answer.casefold() for word in wanted) / len(wanted)
    if reward.rule == "exactMatch":
        return lambda candidate: float(candidate.answer.strip() == reference_of(candidate, place).strip())
    if reward.rule == "numericMatch":
        return lambda candidate: _numeric_match(candidate, place)
    assert reward.rule == "jsonSchema"
    assert reward.schema_ is not None
    fits = make_fit(reward.schema_, f"{place}.schema")
    return lambda candidate: float(fits(candidate.answer))


def words(text: str) -> list[str]:
    """Words and signs of a text, in lower case."""
    return _WORD.findall(text.lower())


def repeated_share(text: str) -> float:
    """1 − distinct-3: the share of a text's 3-grams (of words and signs) that stood before; 0 for fewer than three."""
    found = words(text)
    grams = list(zip(found, found[1:], found[2:], strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def last_number(text: str) -> float | None:
    """The last number in a text: 1,234.5 is one, and so is -3e-2."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("−", "-")) if found else None


def _numeric_match(candidate: Candidate, place: str) -> float:
    """1 where the last number of the answer is the last number of the row's answer."""
    reference = reference_of(candidate, place)
    wanted = last_number(reference)
    if wanted is None:
        raise InputError(
            f"{place}.rule: numericMatch compares numbers, and the answer of row {candidate.row_id} holds none "
            f'("{reference[:40]}")'
        )
    found = last_number(candidate.answer)
    return float(found is not None and math.isclose(found, wanted, rel_tol=_CLOSE))


def reference_of(candidate: Candidate, place: str) -> str:
    """The answer of the prompt's row.

    Raises:
        InputError: if the row has none.
    """
    if candidate.reference is None:
        raise InputError(
            f"{place}: compares with the answer of the prompt's row, and row {candidate.row_id} has none. "
            "Name prompts with answers, or another reward"
        )
    return candidate.reference
