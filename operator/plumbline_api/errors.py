"""Problems a user can mend, in the same words on the command line, in status and in the trainer."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError


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
            yield Problem(path, f"unknown field{_suggestion(str(location[-1]), _siblings(model, location[:-1]))}")
        elif kind == "missing":
            yield Problem(path, "required, but not set")
        elif kind == "value_error":
            yield Problem(path, item["msg"].removeprefix("Value error, "))
        elif kind in {"literal_error", "enum"}:
            expected = item.get("ctx", {}).get("expected", "")
            options = [option.strip(" '") for option in str(expected).replace(" or ", ", ").split(",")]
            yield Problem(path, f"{_shown(value)} is not one of {', '.join(options)}{_suggestion(str(value), options)}")
        elif kind == "string_pattern_mismatch":
            yield Problem(path, f"{_shown(value)} must match {item['ctx']['pattern']}")
        else:
            yield Problem(path, f"{_shown(value)}: {item['msg'][:1].lower()}{item['msg'][1:]}")


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and part.startswith(("function-", "constrained-", "nullable"))


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    return text if len(text) <= 80 else text[:77] + "…"


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
