"""What advantage-weighted regression minimises: −log p of logged answers, weighted by how good they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from plumbline_api.methods import Awr
from torch import Tensor

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.objective import scored_tokens, token_weights
from plumbline_trainer.engine.packing import PackedBatch
from plumbline_trainer.errors import InputError
from plumbline_trainer.losses.awr import advantage_weights, expectile
from plumbline_trainer.losses.likelihood import negative_log_likelihood


@dataclasses.dataclass(frozen=True)
class WeighedAnswers:
    """Rows whose responses have their weights."""

    rows: list[Encoded]
    """To train on."""
    held_out: list[Encoded]
    """To evaluate on."""
    figures: dict[str, float]
    """What is known of the weights before anything is trained."""


class WeightedAnswers:
    """L = Σ_tokens w · (−log p) ÷ Σ_tokens 1 over a step, rows counting by their weight in both sums.

    A weight belongs to a whole answer and stands before the log-likelihood of all of it, as in the papers, where an
    action is an answer; a mean per answer would weigh a token the less the longer its answer is. The divisor does not
    hold the weights: a step of poor answers moves the policy little, and the loss of a row does not depend on which
    others are in its step. With equal weights of 1 this is `sft`.
    """

    def __init__(self, *, clip: float) -> None:
        """Put it together; `clip` is the largest weight, for the figures."""
        self.clip = clip

    def size(self, row: Encoded) -> float:
        """Weight of the row times scored tokens of all its answers."""
        return row.weight * scored_tokens(row)

    def sums(self, batch: PackedBatch, scores: Tensor) -> dict[str, Tensor]:
        """The loss, −log p without the weights, the mean weight of a token, and the share of tokens at the clip."""
        rows = token_weights(batch)
        weights = answer_weights(batch)
        return {
            "loss": negative_log_likelihood(scores, rows * weights),
            "sftLoss": negative_log_likelihood(scores.detach(), rows),
            "weight": (rows * weights).sum(),
            "clippedWeights": (rows * (weights >= self.clip * (1 - 1e-6))).sum(),
        }


def answer_weights(batch: PackedBatch) -> Tensor:
    """Weight of the answer that each scored token belongs to, [N]."""
    device = batch.weights.device
    counts = torch.tensor([len(answer.scored) for answer in batch.answers], device=device)
    weights = torch.tensor([answer.response.weight for answer in batch.answers], device=device)
    return weights.repeat_interleave(counts)


def weigh_answers(rows: Sequence[Encoded], held_out: Sequence[Encoded], parameters: Awr) -> WeighedAnswers:
    """Give every answer its weight min(exp((score − V) / (σ·β)), w_max).

    V is the expectile of the scores of all answers to the prompt, in whichever rows they stand, where there are
    several; else that of all training answers. σ is the root mean square of score − V over training answers, or 1.
    Held-out prompts have their own V; σ, and V where they have one answer, are those of the training rows.

    Args:
        rows: Training rows; every response has a score.
        held_out: Rows to evaluate on.
        parameters: Of the stage.

    Raises:
        InputError: if no answer is better than another to its prompt, so that there is nothing to learn.
    """
    overall = float(expectile(_scores(rows), parameters.expectile))
    advantages = _advantages(rows, overall, parameters.expectile)
    scale = float(advantages.square().mean().sqrt())
    if scale == 0:
        raise InputError(
            "every answer scores exactly the baseline of its prompt, so that none is better than another. "
            "Check the column of scores, or imitate all answers alike with sft"
        )
    if parameters.score_scale == "none":
        scale = 1.0

    def weights_of(values: Tensor) -> Tensor:
        return advantage_weights(values / scale, beta=parameters.beta, clip=parameters.weight_clip)

    weights = weights_of(advantages)
    figures = {
        "answers": float(len(weights)),
        "effectiveAnswers": float(weights.sum().square() / weights.square().sum()),
        "clippedWeights": float((weights >= parameters.weight_clip * (1 - 1e-6)).double().mean()),
        "scoreMean": float(_scores(rows).mean()),
        "advantageScale": float(advantages.square().mean().sqrt()),
    }
    others = weights_of(_advantages(held_out, overall, parameters.expectile))
    return WeighedAnswers(_weighed(rows, weights), _weighed(held_out, others), figures)


def _scores(rows: Sequence[Encoded]) -> Tensor:
    """[answers] float64, in order."""
    return torch.tensor([_score(response.score) for row in rows for response in row.responses], dtype=torch.float64)


def _score(value: float | None) -> float:
    assert value is not None, "rows without scores are refused when they are read"
    return value


def _advantages(rows: Sequence[Encoded], overall: float, tau: float) -> Tensor:
    """Score − V of every answer, [answers] float64."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row.group, []).extend(_score(response.score) for response in row.responses)
    baselines = {
        group: float(expectile(torch.tensor(scores, dtype=torch.float64), tau)) if len(scores) > 1 else overall
        for group, scores in found.items()
    }
    own = torch.tensor([baselines[row.group] for row in rows for _ in row.responses], dtype=torch.float64)
    return _scores(rows) - own


def _weighed(rows: Sequence[Encoded], weights: Tensor) -> list[Encoded]:
    left = iter(weights.tolist())
    return [
        dataclasses.replace(
            row, responses=[dataclasses.replace(response, weight=next(left)) for response in row.responses]
        )
        for row in rows
    ]
