"""Answers that are desirable or not, judged against a reference point that all rows of a step share (KTO)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from plumbline_api.methods import Kto
from torch import Tensor

from plumbline_trainer.data.encode import Encoded, EncodedResponse
from plumbline_trainer.engine.ahead import FirstBatches
from plumbline_trainer.engine.packing import PackedBatch
from plumbline_trainer.engine.references import References
from plumbline_trainer.engine.scoring import Scores
from plumbline_trainer.losses.kto import kto_loss, reference_point
from plumbline_trainer.losses.preference import log_ratio


class DesirableAnswers:
    """KTO: mean over the answers of a step, by the weight of their rows.

    The reference point comes from passes without gradient over the whole step, on all ranks, before any backward. Rows
    of the first micro-batches lend their prompts to the mismatched answers, which cost their own tokens only.
    """

    def __init__(
        self,
        references: References,
        score: Callable[[Sequence[Encoded]], Scores],
        parameters: Kto,
    ) -> None:
        """Set up.

        Args:
            references: Of the rows and of their mismatched rows.
            score: The policy's log-probabilities of rows, without gradient; every rank gets all of them.
            parameters: β and the weights.
        """
        self.references, self.score, self.parameters = references, score, parameters
        self.point = torch.zeros(())
        self._shares: dict[str, float] = {}

    def size(self, row: Encoded) -> float:
        """Every answer counts by its row's weight."""
        return row.weight * len(row.responses)

    def look_ahead(self, rows: Sequence[Encoded], first: FirstBatches | None = None) -> None:
        """Take the reference point z from the mismatched rows of the step."""
        others = mismatched_rows(rows, self.parameters.training.max_length)
        policy = torch.cat(self._totals(others, first))
        weights = torch.tensor([row.weight for row in others for _ in row.responses])
        self.point = reference_point(log_ratio(policy, self.references.of(others)), weights)
        size = sum(self.size(row) for row in rows) or 1.0
        self._shares = {
            name: share
            for name in ("desirable", "undesirable")
            if (share := sum(row.weight for row in rows for item in row.responses if item.role == name) / size) > 0
        }

    def _totals(self, others: Sequence[Encoded], first: FirstBatches | None) -> list[Tensor]:
        """The policy's log-probability of every answer of the mismatched rows, [rows] → [answers]."""
        lent = [] if first is None else first.rows
        known = dict(zip(lent, first.totals(others), strict=True)) if first is not None and lent else {}
        left = [index for index in range(len(others)) if index not in known]
        if left:
            for index, answers in zip(left, self.score([others[index] for index in left]), strict=True):
                known[index] = torch.stack([tokens.sum() for tokens in answers])
        return [known[index] for index in range(len(others))]

    def sums(self, batch: PackedBatch, scores: Tensor) -> dict[str, Tensor]:
        """The loss and figures.

        `kl` is the reference point; `rewardMargin` the distance of the implicit reward β·r from β·z, positive on the
        right side, and `rewardAccuracy` how often it is (ties half); `rewardDesirable` and `rewardUndesirable` are
        means of β·r over the answers of a kind, where the step has some.
        """
        parameters = self.parameters
        policy = batch.sum_by_answer(scores)
        ratios = log_ratio(policy, self.references.totals(batch).to(policy.device))
        desirable = torch.tensor([item.response.role == "desirable" for item in batch.answers], device=policy.device)
        weights = batch.weights[torch.tensor([item.row for item in batch.answers], device=policy.device)]
        point = self.point.to(policy.device)
        losses = kto_loss(
            ratios,
            desirable,
            point,
            beta=parameters.beta,
            desirable_weight=parameters.desirable_weight,
            undesirable_weight=parameters.undesirable_weight,
        )
        with torch.no_grad():
            rewards = parameters.beta * ratios
            margins = torch.where(desirable, 1.0, -1.0) * (rewards - parameters.beta * point)
            figures = {
                "rewardMargin": margins,
                "rewardAccuracy": (margins > 0).float() + 0.5 * (margins == 0).float(),
                "kl": point.expand_as(ratios),
            }
            # The loop divides by the size of the step; a mean over one kind divides by that kind's part of it.
            for name, share in self._shares.items():
                chosen = desirable if name == "desirable" else ~desirable
                figures[f"reward{name.capitalize()}"] = torch.where(chosen, rewards, 0.0) / share
            sums = {name: (weights * values).sum() for name, values in figures.items()}
        return {"loss": (weights * losses).sum(), **sums}


def mismatched_rows(rows: Sequence[Encoded], max_length: int) -> list[Encoded]:
    """Each row's prompt with the answers of the row before it; the first row gets those of the last.

    The order of the rows of a step is a permutation that seed, epoch and row ids make, so that this rotation is a
    random derangement of them: no row gets an answer of its own, for any number of rows from two on. Answers are cut
    where prompt and answer would be too long.

    Args:
        rows: All rows of a step, in the plan's order, at least two.
        max_length: Longest sequence in tokens.
    """
    assert len(rows) >= 2, "a batch of one row has no mismatched pair"
    return [_with_answers_of(row, rows[index - 1], max_length) for index, row in enumerate(rows)]


def _with_answers_of(row: Encoded, other: Encoded, max_length: int) -> Encoded:
    prompt = _prompt(row)
    room = max_length - len(prompt)
    responses = []
    for response in other.responses:
        start = _start(other, response)
        kept = slice(start, start + room)
        responses.append(dataclasses.replace(response, ids=response.ids[kept], mask=response.mask[kept]))
    return dataclasses.replace(
        row, row_id=f"{row.row_id}~{other.row_id}", prompt=prompt, responses=responses, weight=row.weight
    )


def _prompt(row: Encoded) -> list[int]:
    """What is answered; of an unshared row, what comes before the first answer's first scored token."""
    if row.prompt:
        return row.prompt
    first = row.responses[0]
    return first.ids[: _start(row, first)]


def _start(row: Encoded, response: EncodedResponse) -> int:
    """Where a response begins to answer; an unshared one begins with the dialogue before it."""
    return 0 if row.prompt else next(index for index, scored in enumerate(response.mask) if scored)
