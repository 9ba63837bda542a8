"""Whether a text that a model wrote is JSON of a user's schema. No expression of the schema can hang on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from plumbline_api.errors import InputError

from plumbline_trainer.patterns import make_search


def make_fit(schema: str, place: str) -> Callable[[str], bool]:
    """Whether the whole of a text is JSON that fits a schema. References lead nowhere outside it.

    Args:
        schema: JSON schema, as JSON.
        place: field path, for messages.

    Raises:
        InputError: if the schema is none; the function raises it where a reference leads out of the schema, or an
            expression takes too long.
    """
    from jsonschema import SchemaError, ValidationError
    from jsonschema.validators import extend, validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    document = json.loads(schema)
    kind = validator_for(document)
    try:
        kind.check_schema(document, format_checker=kind.FORMAT_CHECKER)  # expressions are a format
    except SchemaError as error:
        where = "/".join(map(str, error.absolute_path))
        raise InputError(
            f"{place}: is not a JSON schema{f' (at {where})' if where else ''}: {error.message}"
        ) from error
    if {"unevaluatedProperties", "patternProperties"} <= set(_keys(document)):
        # The library gathers evaluated names with searches that nothing bounds.
        raise InputError(
            f"{place}: unevaluatedProperties cannot stand beside patternProperties here; say additionalProperties"
        )
    validator = extend(kind, _bounded(place))(document, registry=Registry())

    def fits(text: str) -> bool:
        try:
            validator.validate(json.loads(text, parse_constant=_refuse_constant))
        except (ValueError, ValidationError, RecursionError):
            return False
        except Unresolvable as error:
            raise InputError(f'{place}: refers to "{error.ref}", which is not in it. Put it under $defs') from error
        return True

    return fits


def _bounded(place: str) -> dict[str, Any]:
    """The keywords that search by expression, each search with a limit of time."""
    from jsonschema import ValidationError

    def fits_pattern(validator: Any, pattern: str, value: Any, _schema: Any) -> Iterator[ValidationError]:
        if validator.is_type(value, "string") and not make_search(pattern, place)(value):
            yield ValidationError(f"does not match {pattern}")

    def named_by_pattern(validator: Any, patterns: Any, value: Any, _schema: Any) -> Iterator[ValidationError]:
        if validator.is_type(value, "object"):
            for pattern, inner in patterns.items():
                holds = make_search(pattern, place)
                for name in filter(holds, value):
                    yield from validator.descend(value[name], inner, path=name, schema_path=pattern)

    def additional(validator: Any, inner: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
        if validator.is_type(value, "object"):
            searches = [make_search(pattern, place) for pattern in schema.get("patternProperties", {})]
            for name in value.keys() - schema.get("properties", {}).keys():
                if not any(holds(name) for holds in searches):
                    yield from validator.descend(value[name], inner, path=name)

    return {"pattern": fits_pattern, "patternProperties": named_by_pattern, "additionalProperties": additional}


def _keys(schema: Any) -> Iterator[str]:
    """Every key anywhere in a document."""
    if isinstance(schema, dict):
        yield from schema
        schema = list(schema.values())
    for inner in schema if isinstance(schema, list) else ():
        yield from _keys(inner)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
