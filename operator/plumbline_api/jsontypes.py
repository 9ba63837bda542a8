"""Whether values have the JSON types that a model's schema asks for, as strictly as the API server is about them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from plumbline_api.base import PATTERN_WORDS
from plumbline_api.errors import ManifestError, Problem, problems_of

Schema = dict[str, Any]
M = TypeVar("M", bound=BaseModel)

_WANTED = {
    "object": "a mapping is needed",
    "array": "a list is needed",
    "string": "text is needed",
    "integer": "a whole number is needed",
    "number": "a number is needed",
    "boolean": "true or false is needed",
}


def parse_strictly(body: dict[str, Any], model: type[M]) -> M:
    """The model of a body in JSON form.

    Raises:
        ManifestError: with every problem found, each with its field path and remedy.
    """
    found = type_problems(body, model)
    try:
        parsed = model.model_validate(body)
    except ValidationError as error:
        # What pydantic says about a field of the wrong type, or about what it lies in, follows from that.
        told = [problem.path for problem in found]
        others = [p for p in problems_of(error, model) if not any(_lies_in(path, p.path) for path in told)]
        raise ManifestError(sorted([*found, *others])) from error
    if found:
        raise ManifestError(sorted(found))
    return parsed


def _lies_in(path: str, outer: str) -> bool:
    return path == outer or path.startswith((f"{outer}.", f"{outer}["))


def type_problems(body: dict[str, Any], model: type[BaseModel]) -> list[Problem]:
    """Values of another JSON type than the model's: `"4"` or `true` for a number, a list for a mapping, nothing at all.

    pydantic would read some of them as what they are not, and the API server refuses them: a manifest that passes here
    passes there. Unknown fields are left to pydantic.
    """
    schema, definitions = _schema(model)
    return list(_mismatches(body, schema, definitions, ""))


@lru_cache(maxsize=8)
def _schema(model: type[BaseModel]) -> tuple[Schema, Schema]:
    schema = model.model_json_schema(by_alias=True)
    return schema, schema.pop("$defs", {})


def _mismatches(value: Any, schema: Schema, definitions: Schema, path: str) -> Iterator[Problem]:
    is_nullable = any(option.get("type") == "null" for option in schema.get("anyOf", ()))
    schema = _resolved(schema, definitions)
    type_ = schema.get("type")
    if schema.get("x-plumbline-quantity"):
        if isinstance(value, float):  # a whole number or text, says the API server
            yield Problem(path, f'{described(value)}; write it as text: "{value:g}"')
        return
    if type_ not in _WANTED:
        return
    if value is None:
        if type_ == "object":
            remedy = "leave the field out, or write {} for its defaults" if not schema.get("required") else "fill it in"
            yield Problem(path, f"nothing is set below it; {remedy}")
        elif not is_nullable:
            yield Problem(path, f"nothing is set; {_WANTED[type_]}")
        return
    if not _fits(value, type_):
        yield Problem(path, f"{described(value)}; {_wanted(value, schema)}")
        return
    if type_ == "array" and isinstance(schema.get("items"), dict):
        for index, item in enumerate(value):
            yield from _mismatches(item, schema["items"], definitions, f"{path}[{index}]")
    elif type_ == "object":
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, item in value.items():
            inner = known.get(key, others)
            if isinstance(inner, dict):
                yield from _mismatches(item, inner, definitions, f"{path}.{key}" if path else str(key))


def _wanted(value: Any, schema: Schema) -> str:
    type_ = str(schema["type"])
    if words := PATTERN_WORDS.get(str(schema.get("pattern"))):
        return f"write {words}"
    is_quoted = (
        isinstance(value, str) and type_ != "string" and value.strip("-+.0123456789") in ("", "e", "true", "false")
    )
    return f"{_WANTED[type_]}, without quotes" if is_quoted else _WANTED[type_]


def _resolved(schema: Schema, definitions: Schema) -> Schema:
    """The schema that a reference, or a union with null, stands for."""
    while "$ref" in schema or "anyOf" in schema:
        options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
        if len(options) != 1:
            return {}
        schema = definitions[options[0]["$ref"].rsplit("/", 1)[-1]] if "$ref" in options[0] else options[0]
    return schema


def _fits(value: Any, type_: str) -> bool:
    if isinstance(value, bool):
        return type_ == "boolean"
    if isinstance(value, int):
        return type_ in ("integer", "number")
    if isinstance(value, float):
        # Not for pydantic to say: 4.5 is a number, and the message for a fraction names it.
        return type_ in ("integer", "number")
    wanted = {"object": dict, "array": list, "string": str}.get(type_)
    return wanted is not None and isinstance(value, wanted)


def described(value: Any) -> str:
    """A value of the wrong type as people see it in their file; containers are not spelt out."""
    if isinstance(value, dict | list):
        return "this is a mapping" if isinstance(value, dict) else "this is a list"
    if isinstance(value, bool):
        return f"this is {str(value).lower()}"
    return f"this is the number {value}" if isinstance(value, int | float) else f'this is the text "{value:.60}"'
