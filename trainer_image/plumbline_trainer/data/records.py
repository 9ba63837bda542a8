"""From files to raw records: JSON Lines, JSON, Parquet, CSV and text, each record with its place in the file."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plumbline_api.check import DATASET_SUFFIXES

from plumbline_trainer.errors import InputError
from plumbline_trainer.storage import uris

TEXT_SUFFIXES = (".txt", ".md")
LINE_MAX = 64 * 1024 * 1024
"""Longest line that is read; a longer one is a file of another kind."""
GZIP_START = b"\x1f\x8b"


class BadRowError(ValueError):
    """A record of the wrong shape; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a dataset: where it came from, and where it lies on this machine."""

    uri: str
    path: Path

    @property
    def suffix(self) -> str:
        """What says how the rows are stored, such as `.jsonl`."""
        return suffix_of(self.uri)


@dataclass(frozen=True, slots=True)
class Record:
    """A raw record; `problem` instead of `value` where it could not be read."""

    where: str
    """Such as `s3://corpus/prefs.jsonl line 1043`."""
    value: dict[str, Any] | None
    problem: str = ""


def suffix_of(uri: str) -> str:
    """The suffix of a file name, in small letters."""
    return Path(uris.basename(uri)).suffix.lower()


def data_files(names: Iterable[str]) -> list[str]:
    """Of the files of a folder those that hold rows; texts only where there is nothing else.

    A text beside rows is a README or a licence, and no data.
    """
    known = [name for name in names if suffix_of(name) in DATASET_SUFFIXES]
    return [name for name in known if suffix_of(name) not in TEXT_SUFFIXES] or known


def read_records(file: SourceFile) -> Iterator[Record]:
    """Every record of a file, in order.

    Raises:
        InputError: if the file as a whole cannot be read.
    """
    readers = {
        ".jsonl": _json_lines,
        ".json": _json,
        ".parquet": _parquet,
        ".csv": _csv,
        ".txt": _paragraphs,
        ".md": _paragraphs,
    }
    reader = readers.get(file.suffix)
    if reader is None:
        raise InputError(f"{file.uri}: the suffix says how rows are stored; known are {', '.join(DATASET_SUFFIXES)}")
    return reader(file)


def _json_lines(file: SourceFile) -> Iterator[Record]:
    with file.path.open("rb") as source:
        number = 0
        while line := source.readline(LINE_MAX):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                if line.startswith(GZIP_START):
                    raise InputError(f"{file.uri} is compressed by gzip. Unpack it")
            if not line.strip():
                continue
            where = f"{file.uri} line {number}"
            if len(line) >= LINE_MAX:
                raise InputError(f"{where}: longer than {LINE_MAX >> 20} MiB; is this JSON Lines, one object per line?")
            yield _json_record(where, line)


def _json_record(where: str, line: bytes) -> Record:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Record(where, None, f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8")
    except RecursionError:
        return Record(where, None, "nested too deeply")
    except ValueError as error:
        return Record(where, None, f"not JSON ({_json_fault(error)})")
    return _record(where, value)


def _record(where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        return Record(where, None, f"{kind_of(value)}, an object with named fields expected")
    return Record(where, value)


def _json_fault(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        said = error.msg.removesuffix(" at")
        return f"{said[:1].lower()}{said[1:]} at character {error.colno}"
    return str(error)


def _json(file: SourceFile) -> Iterator[Record]:
    text = _text(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        at = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        fault = _json_fault(error) if isinstance(error, ValueError) else "nested too deeply"
        hint = " One object per line is JSON Lines: name the file .jsonl" if "extra data" in fault else ""
        raise InputError(f"{file.uri}: {at}not JSON ({fault}).{hint}") from error
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise InputError(f"{file.uri}: a list of objects expected, or an object with one list in it")
    for number, item in enumerate(value, 1):
        yield _record(f"{file.uri} item {number}", item)


def _parquet(file: SourceFile) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(f"{file.uri} row {number}", value)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file.uri}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _csv(file: SourceFile) -> Iterator[Record]:
    csv.field_size_limit(LINE_MAX)
    with file.path.open(encoding="utf-8-sig", newline="") as source:
        reader = csv.DictReader(source, strict=True)
        try:
            if not reader.fieldnames:
                return
            if len(reader.fieldnames) == 1 and (found := re.search(r"[;\t|]", reader.fieldnames[0])):
                between = "tabs" if found[0] == "\t" else f'"{found[0]}"'
                raise InputError(f"{file.uri} line 1: columns are separated by {between}. Separate them by commas")
            while True:
                start = reader.line_num + 1
                row = next(reader, None)
                if row is None:
                    return
                where = f"{file.uri} line {start}"
                if None in row:
                    yield Record(where, None, f"{len(row) - 1 + len(row[None])} cells, the header has {len(row) - 1}")
                elif (short := sum(cell is None for cell in row.values())) > 0:
                    yield Record(where, None, f"{len(row) - short} cells, the header has {len(row)}")
                else:
                    yield Record(where, dict(row))
        except csv.Error as error:
            raise InputError(f"{file.uri} line {reader.line_num}: not CSV ({error})") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{file.uri} after line {reader.line_num}: not UTF-8. Save the file as UTF-8") from error


def _paragraphs(file: SourceFile) -> Iterator[Record]:
    """Text between blank lines. The place is the line that it begins on."""
    line = 1
    for piece in re.split(r"(\n[ \t\r]*(?:\n[ \t\r]*)+)", _text(file)):
        if text := piece.strip():
            begins = line + piece[: piece.index(text)].count("\n")
            yield Record(f"{file.uri} line {begins}", {"text": text})
        line += piece.count("\n")


def _text(file: SourceFile) -> str:
    data = file.path.read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{file.uri} line {line}: not UTF-8. Save the file as UTF-8") from error


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float) and not math.isfinite(value):
        return "no finite number"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else type(value).__name__


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
