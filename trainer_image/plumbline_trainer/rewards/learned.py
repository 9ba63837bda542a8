"""Rewards by models: a rewardModel stage of a pipeline, and sequence classifiers from outside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from plumbline_api.online import Reward
from torch import Tensor

from plumbline_trainer.data.rows import Message
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.models.classifier import Classifier
from plumbline_trainer.models.reward import RewardModel
from plumbline_trainer.rewards.interface import Candidate


class StageReward:
    """The output of a rewardModel stage.

    Each head is read relative to its mean over training answers (`mean` of reward_model.json), because only
    differences mean something and the heads of an ensemble differ in their zero. Nothing is divided: `normalize` does.
    """

    def __init__(self, model: RewardModel, reward: Reward) -> None:
        self.model = model
        self._how = reward.ensemble or "mean"
        self._factor = 1.0 if reward.std_factor is None else reward.std_factor

    def score(self, candidates: Sequence[Candidate], ranks: Ranks) -> Tensor:
        """[candidates] float32: one value of all heads."""
        heads = self.model.score([dialogue(candidate) for candidate in candidates], ranks=ranks)
        centred = heads.double() - torch.tensor(self.model.config.mean, dtype=torch.float64)
        return combine_heads(centred, self._how, self._factor).float()


class ClassifierReward:
    """A sequence classifier from outside."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier

    def score(self, candidates: Sequence[Candidate], ranks: Ranks) -> Tensor:
        """[candidates] float32: its only logit."""
        return self._classifier.score([dialogue(candidate) for candidate in candidates], ranks=ranks)


def combine_heads(heads: Tensor, how: str, factor: float) -> Tensor:
    """[n, heads] → [n]: mean, min (worst case) or mean − k·std, std with `heads` in the denominator.

    The pessimistic ones make an answer that the ensemble disagrees on worth less (Coste et al. 2024).
    """
    if how == "min":
        return heads.min(dim=1).values
    mean = heads.mean(dim=1)
    if how == "mean":
        return mean
    assert how == "meanMinusStd"
    return mean - factor * heads.std(dim=1, correction=0)


def dialogue(candidate: Candidate) -> list[Message]:
    """Prompt and answer as turns."""
    return [*candidate.prompt, Message("assistant", candidate.answer)]
