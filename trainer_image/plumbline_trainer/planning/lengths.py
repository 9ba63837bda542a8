"""Which rows a stage's `maxLength` will cut or leave without an answer, told before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from plumbline_trainer.planning.datasets import MEASURED_ROWS, SplitFindings


def length_note(rows: SplitFindings, max_length: int) -> str | None:
    """What a limit does to rows with prompts; None where it does nothing. Counts are good to a percent of the rows.

    Args:
        rows: of the training split.
        max_length: longest sequence of the stage, in tokens.
    """
    dropped = _share_above(rows.prompts, max_length - 1)
    cut = _share_above(rows.quantiles, max_length) - dropped
    said = []
    if dropped > 0:
        said.append(
            f"{_about(dropped, rows.rows)} have no room for an answer in maxLength {max_length:,} and are dropped"
        )
    if cut > 0:
        said.append(f"{_about(cut, rows.rows)} lose their end at maxLength {max_length:,}")
    if dropped > 0:
        said.append(f"longest prompt: {rows.prompts[-1]:,} tokens, {rows.longest}")
    return "; ".join(said) or None


def leaves_no_row(rows: SplitFindings, max_length: int) -> bool:
    """Whether every prompt fills the limit and nothing is left to train on; False unless every row was measured."""
    return bool(rows.prompts) and rows.rows <= MEASURED_ROWS and rows.prompts[0] >= max_length


def _share_above(quantiles: Sequence[int], limit: int) -> float:
    """Share of values above a limit, from the values at 0 %, 1 %, … 100 %."""
    return sum(value > limit for value in quantiles[1:]) / 100


def _about(share: float, rows: int) -> str:
    return f"about {max(1, round(share * rows)):,} of {rows:,} rows"
