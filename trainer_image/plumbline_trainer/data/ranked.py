"""The answers of a ranked row: which is better than which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plumbline_trainer.data.records import BadRowError, is_number, kind_of

CONTENT_FIELDS = ("text", "completion", "content")
"""What an answer may be called within its object."""


@dataclass(frozen=True, slots=True)
class RankedCompletion:
    """One answer of a ranked row."""

    index: int
    """Its place in the row as it was written."""
    name: str
    """What messages call it, such as `completions[2].text`."""
    value: Any
    """Text or messages, not checked yet."""
    rank: int
    """0 is best; equal for answers that are not compared with each other."""
    score: float | None = None


def rank_completions(value: Any) -> list[RankedCompletion]:
    """The answers, best first; of equal ones, in the order they are written.

    Plain answers are listed from the best to the worst. Objects say `rank` (lower is better) or `score` (higher is
    better); where all say both, the rank decides.

    Raises:
        BadRowError: if there are fewer than two, if some order is missing, or if all are equal.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise BadRowError(f'"completions" is {kind_of(value)}, a list of answers expected')
    if len(value) < 2:
        raise BadRowError(f'"completions" holds {len(value)} answer{"s" * (len(value) != 1)}, at least two expected')
    if not any(isinstance(item, Mapping) for item in value):
        return [RankedCompletion(i, f"completions[{i}]", item, rank=i) for i, item in enumerate(value)]
    by_rank = all(isinstance(item, Mapping) and item.get("rank") is not None for item in value)
    keys = [_key(item, f"completions[{i}]", by_rank=by_rank) for i, item in enumerate(value)]
    places = {key: rank for rank, key in enumerate(sorted(set(keys)))}
    if len(places) == 1:
        raise BadRowError('the answers of "completions" are all ranked the same, so that none is better')
    found = []
    for i, (item, key) in enumerate(zip(value, keys, strict=True)):
        name, content = _content(item, f"completions[{i}]")
        score = float(item["score"]) if is_number(item.get("score")) else None
        found.append(RankedCompletion(i, name, content, places[key], score))
    return sorted(found, key=lambda completion: completion.rank)


def _key(item: Any, name: str, *, by_rank: bool) -> float:
    """What answers are sorted by, ascending."""
    if not isinstance(item, Mapping):
        raise BadRowError(f'"{name}" is {kind_of(item)} where others are objects; give each answer a rank or a score')
    field = "rank" if by_rank else "score"
    number = item.get(field)
    if number is None:
        raise BadRowError(f'"{name}" has no rank and no score that every answer has; give each the same one of them')
    if not is_number(number):
        raise BadRowError(f'"{name}.{field}" is {kind_of(number)}, a finite number expected')
    return float(number) if by_rank else -float(number)


def _content(item: Mapping[str, Any], name: str) -> tuple[str, Any]:
    given = [field for field in CONTENT_FIELDS if item.get(field) is not None]
    if len(given) != 1:
        found = f"has {' and '.join(given)}" if given else "has no answer"
        raise BadRowError(f'"{name}" {found}; exactly one of {", ".join(CONTENT_FIELDS)} expected')
    return f"{name}.{given[0]}", item[given[0]]
