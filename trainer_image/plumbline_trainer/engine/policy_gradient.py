"""What stages that learn from their own answers minimise, in a form that adds up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.experience import Experience
from plumbline_trainer.engine.objective import token_weights
from plumbline_trainer.engine.packing import PackedBatch
from plumbline_trainer.losses.kl import KlEstimator, kl_estimate
from plumbline_trainer.losses.policy_gradient import clipped_policy_loss, clipped_value_loss


@dataclass(frozen=True)
class PolicyObjective:
    """The clipped surrogate of a rollout's answers, with an entropy bonus and KL as a loss where they are asked for."""

    experience: Experience
    advantages: Tensor
    """[N]; [A] where ratios are those of whole answers."""
    clip_low: float
    clip_high: float
    whole_answers: bool = False
    """Whether the ratio is that of an answer instead of each token's."""
    loss_over: Literal["tokens", "answers"] = "tokens"
    """Mean over tokens, or over answers of the means over their tokens."""
    entropy_coefficient: float = 0.0
    kl_coefficient: float = 0.0
    """Of KL as a term of the loss."""
    kl_estimator: KlEstimator = "k3"

    def size(self, rows: Sequence[Encoded]) -> float:
        """Normaliser of the rows of a step: tokens, or answers; rows count by their weight."""
        if self.whole_answers or self.loss_over == "answers":
            return sum(row.weight * len(row.responses) for row in rows) or 1.0
        return sum(row.weight * len(response.ids) for row in rows for response in row.responses) or 1.0

    @property
    def needs_entropy(self) -> bool:
        """Whether entropies with gradients are part of the loss."""
        return self.entropy_coefficient != 0.0

    def sums(self, batch: PackedBatch, scores: Tensor, entropies: Tensor | None) -> dict[str, Tensor]:
        """Sums over a batch: `loss` with the gradient; `clipFraction`, `ratioGap` (of |ratio − 1|) without.

        Args:
            batch: Answers of the rollout.
            scores: [n] log-probabilities of their tokens.
            entropies: [n] entropies, if they are needed.
        """
        weights = token_weights(batch)
        old = self.experience.of_tokens(batch, self.experience.old)
        if self.whole_answers:
            owners = torch.tensor([answer.row for answer in batch.answers], device=batch.weights.device)
            terms = clipped_policy_loss(
                batch.sum_by_answer(scores),
                batch.sum_by_answer(old),
                self.experience.of_answers(batch, self.advantages),
                clip_low=self.clip_low,
                clip_high=self.clip_high,
            )
            shares = batch.weights[owners]
            per_token = weights / batch.answer_tokens.repeat_interleave(batch.answer_tokens.long())
        else:
            advantages = self.experience.of_tokens(batch, self.advantages)
            terms = clipped_policy_loss(scores, old, advantages, clip_low=self.clip_low, clip_high=self.clip_high)
            per_token = weights
            if self.loss_over == "answers":
                per_token = weights / batch.answer_tokens.repeat_interleave(batch.answer_tokens.long())
            shares = per_token
        loss = (shares * terms.loss).sum()
        found = {
            "clipFraction": (shares * terms.clipped).sum(),
            "ratioGap": (shares * (terms.ratio - 1.0).abs()).sum(),
        }
        if self.kl_coefficient:
            reference = self.experience.of_tokens(batch, self.experience.reference)
            divergence = (per_token * kl_estimate(scores, reference, self.kl_estimator)).sum()
            loss = loss + self.kl_coefficient * divergence
            found["klLoss"] = divergence.detach()
        if entropies is not None and self.needs_entropy:
            loss = loss - self.entropy_coefficient * (per_token * entropies).sum()
        return {"loss": loss, **found}


@dataclass(frozen=True)
class ValueObjective:
    """The clipped squared error of a critic, per token."""

    experience: Experience
    returns: Tensor
    """[N]"""
    clip: float | None
    coefficient: float

    def size(self, rows: Sequence[Encoded]) -> float:
        """Tokens; rows count by their weight."""
        return sum(row.weight * len(response.ids) for row in rows for response in row.responses) or 1.0

    def sums(self, batch: PackedBatch, values: Tensor) -> dict[str, Tensor]:
        """Sums over a batch: `loss`, `valueLoss`, `valueClipFraction`.

        Args:
            batch: Answers of the rollout.
            values: [n] what the critic says before each of their tokens.
        """
        assert self.experience.values is not None
        losses, clipped = clipped_value_loss(
            values,
            self.experience.of_tokens(batch, self.experience.values),
            self.experience.of_tokens(batch, self.returns),
            clip=self.clip,
        )
        weights = token_weights(batch)
        loss = (weights * losses).sum()
        return {
            "loss": self.coefficient * loss,
            "valueLoss": loss.detach(),
            "valueClipFraction": (weights * clipped).sum(),
        }
