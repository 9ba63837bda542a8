"""Rows of other datasets that are mixed among a stage's own, against forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from plumbline_api.methods import PolicyStage

from plumbline_trainer.data.encode import Encoded, EncodedRows, Method, encode_rows
from plumbline_trainer.data.loading import load_rows

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext
    from plumbline_trainer.models.tokenizer import Tokenizer


@dataclass
class RehearsalRows:
    """Encoded rows of every dataset to mix in, as declared."""

    datasets: list[EncodedRows] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def behind(self, own: Sequence[Encoded]) -> list[Encoded]:
        """The stage's own rows, then all others: the numbering of the step plan."""
        return [*own, *(row for dataset in self.datasets for row in dataset.rows)]

    @property
    def plan(self) -> list[tuple[list[str], float]]:
        """Row ids and share of each dataset."""
        ids = [[row.row_id for row in dataset.rows] for dataset in self.datasets]
        return list(zip(ids, self.shares, strict=True))


def load_rehearsal(
    context: StageContext, parameters: PolicyStage, tokenizer: Tokenizer, *, method: Method
) -> RehearsalRows:
    """Training rows of the datasets that `rehearsal` names.

    Args:
        context: Of the stage.
        parameters: The stage's.
        tokenizer: Of the policy.
        method: What carries loss in rows with a prompt; raw text is learned whole.

    Raises:
        InputError: if one cannot be read or has no rows.
    """
    found = RehearsalRows()
    for number, item in enumerate(parameters.rehearsal or ()):
        rows = load_rows(context, context.input(f"rehearsal.{number}.dataset"), "train")
        found.datasets.append(encode_rows(rows, tokenizer, method=method, max_length=parameters.training.max_length))
        found.shares.append(item.share)
    return found
