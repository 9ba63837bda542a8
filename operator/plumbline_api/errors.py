"""Problems a user can mend, in the same words on the command line, in status and in the trainer."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from plumbline_api.base import PATTERN_WORDS


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong with what the user wrote: where, what, and the remedy."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InputError(Exception):
    """The user's input is wrong; trying again without a change cannot help (trainer exit code 2)."""

    reason = "BadInput"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class ManifestError(InputError):
    """A manifest that does not pass the checks, with every problem found."""

    reason = "InvalidSpec"

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


def field_path(location: tuple[int | str, ...]) -> str:
    """`("spec", "stages", 2, "dpo")` as `spec.stages[2].dpo`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Turn pydantic's report into problems with a field path and a remedy; near-miss names are suggested."""
    return sorted(set(_problems(error, model)))


def _problems(error: ValidationError, model: type[BaseModel]) -> Iterator[Problem]:
    for item in error.errors(include_url=False):
        location = tuple(part for part in item["loc"] if not _is_union_tag(part))
        path = field_path(location)
        kind, value = item["type"], item.get("input")
        if kind == "extra_forbidden":
            yield Problem(path, f"unknown field{_remedy(str(location[-1]), location[:-1], model)}")
        elif kind == "missing":
            yield Problem(path, "required, but not set")
        elif kind == "value_error":
            yield Problem(path, item["msg"].removeprefix("Value error, "))
        elif kind in {"literal_error", "enum"}:
            expected = item.get("ctx", {}).get("expected", "")
            options = [option.strip(" '") for option in str(expected).replace(" or ", ", ").split(",")]
            yield Problem(path, f"{_shown(value)} is not one of {', '.join(options)}{_suggestion(str(value), options)}")
        else:
            yield Problem(path, f"{_shown(value)} {_wanted(kind, value, item)}")


_BOUNDS = {
    "greater_than": "is too small; it must be over {gt}",
    "greater_than_equal": "is too small; it must be at least {ge}",
    "less_than": "is too large; it must be below {lt}",
    "less_than_equal": "is too large; it must be at most {le}",
    "int_parsing_size": "is too large",
    "finite_number": "is no finite number",
    "int_from_float": "is no whole number",
    "string_too_long": "has {size} characters; at most {max_length} are allowed",
    "string_too_short": "has {size} characters; at least {min_length} are needed",
    "too_long": "has {size} entries; at most {max_length} are allowed",
    "too_short": "has {size} entries; at least {min_length} must be there",
}


def _wanted(kind: str, value: Any, item: Any) -> str:
    """What a value must be, in the words of people rather than of the parser."""
    context = dict(item.get("ctx", {}))
    if kind == "string_pattern_mismatch":
        pattern = str(context.get("pattern"))
        return f"must be {PATTERN_WORDS[pattern]}" if pattern in PATTERN_WORDS else f"must match {pattern}"
    if kind in _BOUNDS:
        size = len(value) if isinstance(value, str | list | dict) else 0
        plain = {name: f"{bound:g}" if isinstance(bound, float) else bound for name, bound in context.items()}
        return "must not be empty" if kind.endswith("_short") and not size else _BOUNDS[kind].format(**plain, size=size)
    message = str(item["msg"])
    return f"does not fit: {message[:1].lower()}{message[1:]}"


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and part.startswith(("function-", "constrained-", "nullable"))


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "the mapping" if isinstance(value, dict) else "the list"
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    return text if len(text) <= 80 else text[:77] + "…"


def _remedy(name: str, place: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """Where a field that is not known at a place is known: beside what it was put into, within a field there, or under
    another name."""
    if place and name != place[-1] and isinstance(place[-1], str) and name in _siblings(model, place[:-1]):
        return f". It belongs beside {place[-1]}, one level up"
    known = _siblings(model, place)
    within = [field for field in known if name in _siblings(model, (*place, field))]
    return f". It belongs into {' or '.join(within)}" if within else _suggestion(name, known)


def _suggestion(name: str, options: list[str]) -> str:
    lowered = {option.lower().replace("_", ""): option for option in options}
    close = difflib.get_close_matches(name.lower().replace("_", "").replace("-", ""), list(lowered), n=1, cutoff=0.6)
    if close:
        return f". Did you mean {lowered[close[0]]}?"
    return f". Known here: {', '.join(sorted(options))}" if 0 < len(options) <= 24 else ""


def _siblings(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The wire names that are known at a location of a model."""
    current: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, int) or current is None:
            continue
        field = next((f for n, f in current.model_fields.items() if part in (f.alias, n)), None)
        current = _model_within(field.annotation) if field is not None else None
    return [field.alias or name for name, field in current.model_fields.items()] if current is not None else []


def _model_within(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _model_within(inner)) is not None:
            return found
    return None
