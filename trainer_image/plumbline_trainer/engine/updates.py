"""What happens to a rollout: one look without gradients, then updates of policy and critic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.accumulation import Measured, accumulate
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.experience import Experience
from plumbline_trainer.engine.online_state import Trained
from plumbline_trainer.engine.packing import PackedBatch
from plumbline_trainer.engine.policy_gradient import PolicyObjective, ValueObjective
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.scoring import score_entropies, score_rows
from plumbline_trainer.engine.values import ValueScorer, score_values
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.adapters import adapters_disabled

RATIO_TOLERANCES = {"float32": 1e-5, "bfloat16": 0.02}
"""Largest mean |ratio − 1| before the first update on a rollout: policy and sampler are then the same weights."""


def look_at(
    experience: Experience,
    policy: Scorer,
    reference: Scorer | None,
    critic: Scorer | None,
    *,
    tokens_per_batch: int,
    ranks: Ranks,
) -> None:
    """Log-probabilities, entropies and values of all answers, put into the experience.

    Args:
        experience: A scored rollout.
        policy: As it sampled.
        reference: None for the policy without its adapter.
        critic: A `ValueScorer`, if there is one.
        tokens_per_batch: Token budget of one forward pass.
        ranks: Processes that share the work.
    """
    rows = experience.all_rows
    settings: dict[str, Any] = {"tokens_per_batch": tokens_per_batch, "device": ranks.device, "ranks": ranks}
    old, entropy = score_entropies(policy, rows, **settings)
    experience.old, experience.entropy = _flat(old), _flat(entropy)
    if reference is not None:
        experience.reference = _flat(score_rows(reference, rows, **settings))
    else:
        with adapters_disabled(policy.model):
            experience.reference = _flat(score_rows(policy, rows, **settings))
    if critic is not None:
        assert isinstance(critic, ValueScorer)
        values = score_values(critic, rows, tokens_per_batch=tokens_per_batch, ranks=ranks)
        experience.values = torch.cat([part[:, 0] for part in values])


def update(
    rows: Sequence[Encoded],
    policy: Trained,
    objective: PolicyObjective,
    critic: Trained | None,
    value_objective: ValueObjective | None,
    *,
    tokens_per_batch: int,
    ranks: Ranks,
    iteration: int,
    is_first: bool,
) -> dict[str, float]:
    """One optimizer step of the policy, and one of the critic, on some rows of a rollout.

    Returns:
        Means over the rows, and gradient norms.

    Raises:
        InputError: if a loss or a gradient is no longer finite.
        RuntimeError: if the policy before its first update is not the one that sampled.
    """
    scorer = policy.scorer
    settings: dict[str, Any] = {"tokens_per_batch": tokens_per_batch, "ranks": ranks}
    means = accumulate(rows, measure_policy(scorer, objective), size=objective.size(rows), **settings)
    if is_first and not means["ratioGap"] <= RATIO_TOLERANCES[scorer.precision]:
        raise RuntimeError(
            f"before the first update on a rollout new and old probabilities differ by {means['ratioGap']:.2g} in the "
            "mean: the two passes do not compute the same policy"
        )
    means["learningRate"] = policy.optimizer.learning_rate
    means["gradientNorm"] = policy.optimizer.step(ranks)
    _refuse_no_number(means, ("loss", "gradientNorm"), iteration)
    if critic is not None and value_objective is not None:
        measured = measure_critic(critic.scorer, value_objective)
        found = accumulate(rows, measured, size=value_objective.size(rows), **settings)
        found["criticGradientNorm"] = critic.optimizer.step(ranks)
        _refuse_no_number(found, ("valueLoss", "criticGradientNorm"), iteration)
        means |= found
    return means


def measure_policy(scorer: Scorer, objective: PolicyObjective) -> Callable[[int, PackedBatch], Measured]:
    """What an update of the policy minimises over a micro-batch, for `accumulate`."""

    def measure(_number: int, batch: PackedBatch) -> Measured:
        scores, entropies = scorer.with_entropy(batch) if objective.needs_entropy else (scorer(batch), None)
        found = objective.sums(batch, scores, entropies)
        return found["loss"], found

    return measure


def measure_critic(scorer: Scorer, objective: ValueObjective) -> Callable[[int, PackedBatch], Measured]:
    """The same of the critic."""

    def measure(_number: int, batch: PackedBatch) -> Measured:
        found = objective.sums(batch, scorer(batch)[:, 0])
        return found.pop("loss"), found

    return measure


def _refuse_no_number(means: dict[str, float], names: tuple[str, ...], iteration: int) -> None:
    for name in names:
        if not math.isfinite(means[name]):
            raise InputError(
                f"iteration {iteration}: {name} is {means[name]}; training diverged. Lower training.learningRate, set "
                "scoreClip, or set training.precision: float32",
                reason="Diverged",
            )


def _flat(scores: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.cat([tokens for row in scores for tokens in row])
