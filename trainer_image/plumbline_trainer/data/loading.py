"""The rows that a stage reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from plumbline_api.stagerun import StageInput

from plumbline_trainer.data.formats import ParsedDataset, parse_dataset
from plumbline_trainer.data.rows import Row
from plumbline_trainer.data.sources import fetch_dataset
from plumbline_trainer.data.splits import SPLITS, Split, split_of
from plumbline_trainer.errors import InputError

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext


def load_dataset(context: StageContext, item: StageInput) -> ParsedDataset:
    """Fetch and verify a dataset, and parse all of it."""
    return parse_dataset(fetch_dataset(context, item), item.name, item.settings)


def load_rows(context: StageContext, item: StageInput, split: Split, *, may_be_empty: bool | None = None) -> list[Row]:
    """The rows of one split of a dataset, in the order of its files.

    Raises:
        InputError: if it cannot be read, has changed since preflight, or has no rows to train or test on. An evaluation
            split may be empty, unless `may_be_empty` says otherwise.
    """
    if may_be_empty is None:
        may_be_empty = split == "evaluation"
    rows = load_dataset(context, item).rows
    chosen = [row for row in rows if split_of(row, item.settings) == split]
    if not chosen and not may_be_empty:
        raise InputError(empty_split(item.name, split, rows, item.settings))
    return chosen


def load_scored_rows(context: StageContext, item: StageInput, split: Split) -> list[Row]:
    """As `load_rows`, of answers that all have scores.

    Raises:
        InputError: if one has none; or as `load_rows`.
    """
    rows = load_rows(context, item, split)
    where = unscored_row(rows)
    if where is not None:
        raise InputError(f'"{item.name}" {unscored(where)}')
    return rows


def unscored_row(rows: Iterable[Row]) -> str | None:
    """Where the first row with an answer that has no score was read."""
    return next((row.source for row in rows if any(answer.score is None for answer in row.responses)), None)


def empty_split(name: str, split: Split, rows: list[Row], settings: dict[str, object]) -> str:
    """What to say about a split without rows."""
    counts = {kind: sum(split_of(row, settings) == kind for row in rows) for kind in SPLITS}
    there = ", ".join(f"{count:,} in {kind}" for kind, count in counts.items() if count)
    return f'"{name}" has no rows in its {split} split ({len(rows):,} rows: {there}). {split_remedy(split)}'


def split_remedy(split: str) -> str:
    """What to do about a split without rows."""
    if split == "train":
        return "Lower datasets[].split.evaluation and test, or add rows"
    return f"Raise datasets[].split.{split}, add rows, or set datasets[].role to test if no stage trains on it"


def unscored(where: str) -> str:
    """What to say about the row at a place, of which an answer has no score."""
    return (
        f"has answers without a score ({where}); awr weighs answers by their scores. Give every answer one: "
        "{prompt, completion, score} a row, or {text, score} for each of completions"
    )
