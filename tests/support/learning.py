"""A rollout that is given instead of sampled, as the stages' own objectives take it, and one update on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.accumulation import accumulate
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.experience import Experience
from plumbline_trainer.engine.loop import dummy_of
from plumbline_trainer.engine.policy_gradient import PolicyObjective, ValueObjective
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.engine.values import ValueHeads, ValueScorer, score_values
from plumbline_trainer.rollout.interface import Sampled
from torch import Tensor

CPU = torch.device("cpu")
BUDGET = 64
"""Tokens of a micro-batch: a few answers each, so that every step is made of several."""


def experience_of(prompts: list[list[int]], groups: list[list[list[int]]]) -> Experience:
    """Answers to prompts, without log-probabilities yet."""
    rows = [Encoded(f"row-{number}", f"{number}", ids, []) for number, ids in enumerate(prompts)]
    return Experience(rows, [[Sampled(ids, True) for ids in group] for group in groups], BUDGET)


def scorer_of(model: Any, temperature: float) -> Scorer:
    """The fast path of a model."""
    scorer = Scorer(model.requires_grad_(True))
    scorer.temperature = temperature
    return scorer.eval()


def critic_of(classifier: Any, backbone: Any) -> ValueScorer:
    """A scalar classifier of transformers as a critic: `backbone` is a causal model that takes its weights."""
    backbone.base_model.load_state_dict(classifier.base_model.state_dict())
    heads = ValueHeads(classifier.score.weight.detach().clone())
    return ValueScorer(backbone.requires_grad_(True), heads).eval()


def log_probabilities(scorer: Scorer, experience: Experience) -> Tensor:
    """[N] of all tokens of the answers, without gradients."""
    scores = score_rows(scorer, experience.all_rows, tokens_per_batch=BUDGET, device=CPU)
    return torch.cat([tokens for row in scores for tokens in row])


def values_of(scorer: ValueScorer, experience: Experience) -> Tensor:
    """[N] the critic's values before all tokens, without gradients."""
    found = score_values(scorer, experience.all_rows, tokens_per_batch=BUDGET)
    return torch.cat([part[:, 0] for part in found])


def policy_update(scorer: Scorer, experience: Experience, objective: PolicyObjective) -> dict[str, float]:
    """The stage's own figures of an update; gradients are left at the parameters."""
    return _update(scorer, experience, objective, lambda batch: objective.sums(batch, scorer(batch), None))


def value_update(scorer: ValueScorer, experience: Experience, objective: ValueObjective) -> dict[str, float]:
    """The same of the critic."""
    return _update(scorer, experience, objective, lambda batch: objective.sums(batch, scorer(batch)[:, 0]))


def _update(
    scorer: Scorer, experience: Experience, objective: PolicyObjective | ValueObjective, sums: Callable[..., Any]
) -> dict[str, float]:
    for parameter in scorer.parameters():
        parameter.grad = None
    rows = experience.all_rows
    size = objective.size(rows)
    return accumulate(rows, sums, size=size, tokens_per_batch=BUDGET, ranks=Ranks(), dummy=dummy_of)


def descend(scorer: Scorer, rate: float) -> None:
    """One step of plain gradient descent."""
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
