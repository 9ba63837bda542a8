"""How many answers are desirable and how many are not, and what follows for their weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from plumbline_api.methods import Kto

from plumbline_trainer.data.encode import DESIRABLE

BALANCE_RANGE = (1.0, 4 / 3)
"""λ_D·n_D / (λ_U·n_U) that the paper finds to work (Ethayarajh et al. 2024, eq. 8)."""


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """Answers by label."""

    desirable: int = 0
    undesirable: int = 0

    @property
    def one_sided(self) -> str | None:
        """Why nothing can be learnt from answers of one kind, with a remedy; None where there are both."""
        if self.desirable and self.undesirable:
            return None
        there, missing = ("undesirable", "true") if self.undesirable else ("desirable", "false")
        return (
            f"holds only {there} answers ({self.desirable + self.undesirable:,}); kto needs both kinds. "
            f"Add rows with label {missing}, or use sft to imitate answers"
        )

    def advice(self, parameters: Kto) -> str | None:
        """A warning where the weights leave one kind too heavy; None where the balance is right."""
        ratio = parameters.desirable_weight * self.desirable / (parameters.undesirable_weight * self.undesirable)
        low, high = BALANCE_RANGE
        # The tolerance keeps 4 rows to 3 inside.
        if low - 1e-9 <= ratio <= high + 1e-9:
            return None
        wanted = parameters.undesirable_weight * self.undesirable / self.desirable
        return (
            f"desirable : undesirable weighs {ratio:.2f}, best is 1 to 1.33; "
            f"set desirableWeight between {low * wanted:.3g} and {high * wanted:.3g}"
        )


def count_labels(labels: Iterable[str | None]) -> LabelCounts:
    """Count labels of answers or roles of responses."""
    kinds = [DESIRABLE[label] for label in labels if label in DESIRABLE]
    return LabelCounts(kinds.count("desirable"), kinds.count("undesirable"))
