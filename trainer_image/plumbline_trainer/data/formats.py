"""From raw records to rows, for every dataset format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from plumbline_api.artifacts import DATASET_FORMATS

from plumbline_trainer.data.dialogues import looks_like_dialogue
from plumbline_trainer.data.parsers import PARSERS
from plumbline_trainer.data.records import BadRowError, Record, SourceFile, is_number, kind_of, read_records
from plumbline_trainer.data.rows import Row
from plumbline_trainer.data.splits import prompt_group
from plumbline_trainer.errors import InputError

REQUIRED: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "ranked": ("prompt", "completions"),
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "contextResponse": ("context", "response"),
    "unpaired": ("prompt", "completion", "label"),
    "promptCompletion": ("prompt", "completion"),
    "dialogue": ("dialogue",),
    "text": ("text",),
    "prompt": ("prompt",),
}
"""Fields that a row must have; in this order formats are detected."""
OPTIONAL: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", "margin"),
    "instruction": ("input",),
    "dialogue": ("text",),
}
EVERYWHERE = ("weight",)
"""Fields that any format may have, if `columns` names them."""
EXAMPLES = 3


@dataclass
class ParsedDataset:
    """The rows of a dataset, and what was found on the way."""

    format: str
    rows: list[Row] = field(default_factory=list)
    records: int = 0
    bad: list[str] = field(default_factory=list)
    """The first bad rows: where and what."""
    bad_count: int = 0
    equal_pairs: int = 0
    """Preference rows whose answers are the same: they teach nothing."""


def parse_dataset(files: Iterable[SourceFile], name: str, settings: Mapping[str, Any]) -> ParsedDataset:
    """Read every row of a dataset.

    Args:
        files: its files, in order.
        name: of the dataset, for messages.
        settings: `format`, `columns`, `limit`, `maxBadRows` as in the record.

    Raises:
        InputError: if it is empty, if its format cannot be told, or if more rows are bad than are allowed.
    """
    files = list(files)
    columns = dict(settings.get("columns") or {})
    format_ = str(settings.get("format") or "auto")
    if format_ == "auto":
        format_ = detect_format(files, name, columns)
    _check_columns(name, format_, columns)
    found, seen = ParsedDataset(format_), dict[str, int]()
    limit = settings.get("limit")
    for record in islice(_records(files), limit):
        found.records += 1
        try:
            row = parse_record(record, format_, columns)
        except BadRowError as error:
            found.bad_count += 1
            if len(found.bad) < EXAMPLES:
                found.bad.append(f"{record.where}: {error}")
            continue
        count = seen[row.id] = seen.get(row.id, 0) + 1
        found.rows.append(row if count == 1 else _renamed(row, f"{row.id}-{count}"))
        found.equal_pairs += len(row.responses) == 2 and row.responses[0].messages == row.responses[1].messages
    allowed = int(settings.get("maxBadRows") or 0)
    if found.bad_count > allowed:
        share = f"{found.bad_count:,} bad row{'s' if found.bad_count > 1 else ''} of {found.records:,}"
        more = f", {allowed:,} allowed" if allowed else ""
        raise InputError(f"{found.bad[0]} ({share}{more}; allow some with datasets[].maxBadRows)")
    if not found.rows:
        where = files[0].uri if len(files) == 1 else f"{len(files)} files of dataset {name}"
        what = (
            "has no rows" if not found.records else f"has no usable rows ({found.bad_count:,} are bad: {found.bad[0]})"
        )
        raise InputError(f"{where} {what}. Check datasets[].source")
    return found


def detect_format(files: Iterable[SourceFile], name: str, columns: Mapping[str, str]) -> str:
    """The format of a dataset, told by the fields of its first readable record.

    Raises:
        InputError: if they fit no format; the columns are named.
    """
    files, first_fault = list(files), ""
    for record in _records(files):
        if record.value is None:
            first_fault = first_fault or f" ({record.where}: {record.problem})"
            continue
        present = {key for key in record.value if record.value[key] is not None}
        for format_, required in REQUIRED.items():
            if all(columns.get(column, column) in present for column in required):
                text = record.value[columns.get("text", "text")] if format_ == "text" else None
                return "dialogue" if isinstance(text, str) and looks_like_dialogue(text) else format_
        shown = ", ".join(sorted(record.value)) or "none"
        known = "; ".join(f"{kind}: {', '.join(required)}" for kind, required in REQUIRED.items())
        raise InputError(
            f'dataset "{name}" ({record.where}): the columns ({shown}) fit no format. Map them with '
            f"datasets[].columns, such as columns: {{prompt: question}}. Formats and their fields: {known}"
        )
    where = files[0].uri if len(files) == 1 else f"{len(files)} files"
    raise InputError(f'dataset "{name}" ({where}) has no readable rows{first_fault}. Check datasets[].source')


def parse_record(record: Record, format_: str, columns: Mapping[str, str]) -> Row:
    """One row.

    Raises:
        BadRowError: with what is wrong with it.
    """
    if record.value is None:
        raise BadRowError(record.problem)
    fields = _fields(record.value, format_, columns)
    prompt, responses = PARSERS[format_](fields)
    identity = [[m.role, m.content] for m in prompt], [[m.role, m.content] for r in responses for m in r.messages]
    digest = hashlib.sha256(json.dumps(identity, ensure_ascii=True).encode()).hexdigest()[:16]
    weight = _finite(fields, "weight", columns, positive=True) if "weight" in fields else 1.0
    margin = 0.0 if fields.get("margin") is None else _finite(fields, "margin", columns)
    text = responses[0].text if not prompt else None
    return Row(digest, prompt_group(prompt, text), prompt, responses, weight, record.where, margin)


def _records(files: Iterable[SourceFile]) -> Iterable[Record]:
    for file in files:
        yield from read_records(file)


def _renamed(row: Row, name: str) -> Row:
    return replace(row, id=name)


def _check_columns(name: str, format_: str, columns: Mapping[str, str]) -> None:
    if format_ not in DATASET_FORMATS:
        raise InputError(f'dataset "{name}": there is no format "{format_}". Formats: {", ".join(DATASET_FORMATS)}')
    known = (*REQUIRED[format_], *OPTIONAL.get(format_, ()), *EVERYWHERE)
    for column in columns:
        if column not in known:
            raise InputError(
                f'dataset "{name}": datasets[].columns names a field "{column}" that format {format_} does not have. '
                f"Its fields: {', '.join(known)}"
            )


def _fields(value: Mapping[str, Any], format_: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """The fields of the format, under their own names; missing columns are named."""
    found: dict[str, Any] = {}
    for name in (*REQUIRED[format_], *OPTIONAL.get(format_, ())):
        column = columns.get(name, name)
        if column in value:
            found[name] = value[column]
    if "weight" in columns:
        if columns["weight"] not in value:
            raise BadRowError(f'no column "{columns["weight"]}"; the columns are: {", ".join(sorted(value)) or "none"}')
        found["weight"] = value[columns["weight"]]
    if format_ == "dialogue" and found.get("dialogue") is None and "text" in found:
        found["dialogue"] = found["text"]
    for name in REQUIRED[format_]:
        if name not in found:
            column = columns.get(name, name)
            raise BadRowError(
                f'no column "{column}"; the columns are: {", ".join(sorted(map(str, value))) or "none"}. '
                f"Map one with datasets[].columns, such as columns: {{{name}: …}}"
            )
    return found


def _finite(fields: Mapping[str, Any], name: str, columns: Mapping[str, str], *, positive: bool = False) -> float:
    value = fields[name]
    if isinstance(value, str):  # every cell of a CSV file is text
        value = _number(value)
    if not is_number(value) or (positive and value < 0):
        shown = "a negative number" if is_number(value) else kind_of(value)
        wanted = "a number of at least 0" if positive else "a finite number"
        raise BadRowError(f'"{columns.get(name, name)}" is {shown}, {wanted} expected')
    return float(value)


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
