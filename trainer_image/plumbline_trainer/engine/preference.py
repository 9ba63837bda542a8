"""What preference stages minimise: on pairs with a reference, on pairs without one, on ranked responses.

Each loss is a mean over rows by their weight, so that it adds up over micro-batches and ranks. A likelihood term is a
mean over the tokens of each chosen response before it is a mean over rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from plumbline_api.methods import Cpo, Dpo, Orpo, Simpo
from torch import Tensor

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.packing import PackedBatch
from plumbline_trainer.engine.references import References
from plumbline_trainer.losses import preference as losses

Reward = Callable[[PackedBatch, Tensor], Tensor]
"""From the policy's log-probability of each response to its implicit reward over β, [answers] both."""
PairLoss = Callable[[Tensor, Tensor], Tensor]
"""From the rewards over β of chosen and of rejected responses, [rows] each, to the loss of each pair, [rows]."""

DPO_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": losses.sigmoid_loss,
    "robust": losses.robust_loss,
    "ipo": losses.ipo_loss,
    "ipoSum": losses.ipo_loss,
    "hinge": losses.hinge_loss,
    "exo": losses.exo_loss,
    "nca": losses.nca_loss,
    "apoZero": losses.apo_zero_loss,
    "apoDown": losses.apo_down_loss,
}
"""Functions of the values of `dpo.loss`."""


class PairPreference:
    """A loss on the implicit rewards of chosen and rejected responses, and perhaps the likelihood of the chosen ones.

    L = Σ_rows w · (loss(u_w, u_l) + α · NLL) ÷ Σ_rows w, where u is a reward over β and NLL the mean of −log π
    over the chosen response's tokens, or over prompt and chosen response where rows score their context.
    """

    def __init__(self, reward: Reward, loss: PairLoss, *, beta: float, sft_weight: float = 0.0) -> None:
        """Put an objective together.

        Args:
            reward: Reward u of each response, before it is scaled by β.
            loss: Loss of each pair from u of both responses; β is in it.
            beta: Scale of the rewards that are reported.
            sft_weight: Weight α of the likelihood term.
        """
        self.reward, self.loss = reward, loss
        self.beta, self.sft_weight = beta, sft_weight

    def size(self, row: Encoded) -> float:
        """A pair counts by its weight."""
        return row.weight

    def sums(self, batch: PackedBatch, scores: Tensor) -> dict[str, Tensor]:
        """The loss, rewards β·u, how often the chosen one is higher (ties half), log-probabilities, perhaps the NLL."""
        totals = batch.sum_by_answer(scores)
        chosen, rejected = pair_answers(batch)
        rewards = self.reward(batch, totals)
        pair_losses = self.loss(rewards[chosen], rewards[rejected])
        extra: dict[str, Tensor] = {}
        if self.sft_weight:
            likelihoods = mean_likelihoods(batch, scores, totals, chosen)
            pair_losses = pair_losses + self.sft_weight * likelihoods
            extra = {"sftLoss": likelihoods.detach()}
        with torch.no_grad():
            scaled = self.beta * rewards
            margins = scaled[chosen] - scaled[rejected]
            figures = {
                "rewardMargin": margins,
                "rewardAccuracy": (margins > 0).float() + 0.5 * (margins == 0).float(),
                "rewardChosen": scaled[chosen],
                "rewardRejected": scaled[rejected],
                "logpsChosen": totals[chosen],
                "logpsRejected": totals[rejected],
                **extra,
            }
            sums = {name: (batch.weights * values).sum() for name, values in figures.items()}
        return {"loss": (batch.weights * pair_losses).sum(), **sums}


def dpo_objective(parameters: Dpo, references: References) -> PairPreference:
    """DPO and its relatives: rewards are log-ratios to the reference, sums or means over tokens."""

    def log_ratios(batch: PackedBatch, totals: Tensor) -> Tensor:
        ratios = losses.log_ratio(totals, references.totals(batch).to(totals.device))
        return ratios / batch.answer_tokens if parameters.uses_means else ratios

    loss = partial(DPO_LOSSES[parameters.loss], beta=parameters.beta)
    if parameters.takes_label_smoothing:
        loss = partial(loss, label_smoothing=parameters.smoothing)
    return PairPreference(log_ratios, loss, beta=parameters.beta, sft_weight=parameters.sft_weight)


def orpo_objective(parameters: Orpo) -> PairPreference:
    """ORPO: NLL + β · odds-ratio loss, on mean log-probabilities."""

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return parameters.beta * losses.odds_ratio_loss(chosen, rejected)

    return PairPreference(_mean_log_probabilities, loss, beta=parameters.beta, sft_weight=1.0)


def simpo_objective(parameters: Simpo) -> PairPreference:
    """SimPO: a margin between mean log-probabilities."""
    loss = partial(losses.simpo_loss, beta=parameters.beta, gamma=parameters.gamma)
    return PairPreference(_mean_log_probabilities, loss, beta=parameters.beta, sft_weight=parameters.sft_weight)


def cpo_objective(parameters: Cpo) -> PairPreference:
    """CPO: DPO's loss on log-probabilities, without a reference, and the NLL."""
    loss = partial(losses.sigmoid_loss, beta=parameters.beta)
    return PairPreference(_log_probabilities, loss, beta=parameters.beta, sft_weight=parameters.sft_weight)


def _log_probabilities(_batch: PackedBatch, totals: Tensor) -> Tensor:
    return totals


def _mean_log_probabilities(batch: PackedBatch, totals: Tensor) -> Tensor:
    return totals / batch.answer_tokens


class RankedResponses:
    """RRHF: ranked responses to one prompt, and the likelihood of the best one.

    L = Σ_rows w · (ranking loss + α · NLL) ÷ Σ_rows w over mean log-probabilities p; any number of responses per row,
    two at least. NLL is the mean of −log π over the best response's tokens, as in the authors' code; the paper writes
    the sum.
    """

    def __init__(self, *, sft_weight: float) -> None:
        self.sft_weight = sft_weight

    def size(self, row: Encoded) -> float:
        """A row counts by its weight, however many responses it has."""
        return row.weight

    def sums(self, batch: PackedBatch, scores: Tensor) -> dict[str, Tensor]:
        """The loss and its parts, the share of pairs in order (ties half), and the best one's lead over the others."""
        totals = batch.sum_by_answer(scores)
        rows = torch.split(totals / batch.answer_tokens, [len(row.responses) for row in batch.rows])
        ranks = [ranks_of(row).to(totals.device) for row in batch.rows]
        ranking = torch.stack([losses.ranking_loss(means, order) for means, order in zip(rows, ranks, strict=True)])
        best = [int(order.argmin()) for order in ranks]
        likelihoods = -torch.stack([means[place] for means, place in zip(rows, best, strict=True)])
        row_losses = ranking + self.sft_weight * likelihoods
        with torch.no_grad():
            figures = {
                "rankingLoss": ranking,
                "sftLoss": likelihoods,
                "rewardAccuracy": torch.stack([share_in_order(m, order) for m, order in zip(rows, ranks, strict=True)]),
                "rewardMargin": torch.stack([lead(m, place) for m, place in zip(rows, best, strict=True)]),
            }
            sums = {name: (batch.weights * values).sum() for name, values in figures.items()}
        return {"loss": (batch.weights * row_losses).sum(), **sums}


def ranks_of(row: Encoded) -> Tensor:
    """Place of each response of a row, 0 is best, [responses]."""
    return torch.tensor([response.rank for response in row.responses])


def share_in_order(values: Tensor, ranks: Tensor) -> Tensor:
    """Share of pairs of different rank whose better one has the higher value, ties half: [k], [k] → scalar."""
    better = ranks[:, None] < ranks[None, :]
    gaps = (values[:, None] - values[None, :])[better]
    return ((gaps > 0).float() + 0.5 * (gaps == 0).float()).mean()


def lead(values: Tensor, best: int) -> Tensor:
    """By how much one value is above the mean of the others: [k] → scalar."""
    return values[best] - (values.sum() - values[best]) / (len(values) - 1)


def pair_answers(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Index of the chosen and of the rejected answer of each row, [rows] each."""
    places: dict[str, list[int]] = {"chosen": [], "rejected": []}
    for index, answer in enumerate(batch.answers):
        places[answer.response.role].append(index)
    assert len(places["chosen"]) == len(places["rejected"]) == len(batch.rows)
    device = batch.weights.device
    return torch.tensor(places["chosen"], device=device), torch.tensor(places["rejected"], device=device)


def mean_likelihoods(batch: PackedBatch, scores: Tensor, totals: Tensor, chosen: Tensor) -> Tensor:
    """Mean of −log π over the tokens of each row's chosen response and, where it is scored, of its context, [rows].

    Args:
        batch: The batch that was scored.
        scores: [N] log-probabilities of its scored tokens.
        totals: [answers] their sums over each response.
        chosen: [rows] index of the chosen responses.
    """
    return -(totals[chosen] + batch.sum_by_context(scores)) / (batch.answer_tokens[chosen] + batch.context_tokens)
