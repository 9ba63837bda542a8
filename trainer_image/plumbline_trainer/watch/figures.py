"""Figures of one rollout and of the updates on it. Pure; their names and meanings stand in `plumbline_api.watched`.

n answers of T_i tokens, N tokens in all. Values per token are flat [N] in the order of the answers. A figure that has
no value (a correlation where every reward is the same) is left out, so that no figure is ever NaN for that reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plumbline_api.watched import component_figure
from torch import Tensor

REPETITION_ORDER = 3


@dataclass(frozen=True)
class Rollout:
    """The scored answers of one rollout, those of all ranks."""

    ids: Sequence[Sequence[int]]
    """[n][T_i] token ids, the end token included where there is one."""
    finished: Sequence[bool]
    """[n] whether an answer ended by itself."""
    policy: Tensor
    """[N] log-probabilities under the weights that sampled, recomputed by the trainer."""
    reference: Tensor | None
    """[N] log-probabilities under the reference; None where it is not scored."""
    total: Tensor
    """[n] weighted sum of all rewards."""
    components: Mapping[str, Tensor]
    """[n] raw values of each reward that is trained on."""
    scores: Tensor
    """[n] what is learnt from: `total` after penalty and clip."""
    entropies: Tensor | None = None
    """[N] entropy of the policy's distribution at each token."""

    @property
    def lengths(self) -> list[int]:
        """[n] tokens of each answer."""
        return [len(ids) for ids in self.ids]


def rollout_figures(rollout: Rollout) -> dict[str, float]:
    """Figures of a rollout, before anything is learnt from it.

    `length.growth` and `rewardStart` need the rollouts before: see `watch.course`.

    Raises:
        ValueError: if the parts of the rollout have different sizes.
    """
    answers, tokens = len(rollout.ids), sum(rollout.lengths)
    _same("answers", answers, rollout.finished, rollout.total, rollout.scores, *rollout.components.values())
    _same("tokens", tokens, rollout.policy, rollout.reference, rollout.entropies)
    figures = {
        "reward": _mean(rollout.total),
        "score": _mean(rollout.scores),
        "rewardStd": _std(rollout.total),
        **{component_figure(name): _mean(values) for name, values in rollout.components.items()},
        "length.mean": tokens / answers,
        "missingEnd": sum(not finished for finished in rollout.finished) / answers,
        "repetition": sum(repetition(ids) for ids in rollout.ids) / answers,
        "distinct1": distinct(rollout.ids, 1),
        "distinct2": distinct(rollout.ids, 2),
    }
    if rollout.reference is not None:
        divergence = float((rollout.policy.double() - rollout.reference.double()).sum())
        figures |= {"kl": divergence / answers, "klPerToken": divergence / tokens}
    if rollout.entropies is not None:
        figures["entropy"] = _mean(rollout.entropies)
    correlation = spearman(rollout.total.tolist(), rollout.lengths)
    if correlation is not None:
        figures["rewardLengthCorrelation"] = correlation
    return figures


def critic_figures(values: Tensor, returns: Tensor) -> dict[str, float]:
    """How well the critic foresaw the returns [N] of a rollout, before it learns from them.

    1 where values are the returns, 0 where they are no better than a constant, below where they are worse.
    """
    spread = float(returns.double().var(correction=0))
    if spread == 0.0:
        return {}
    return {"valueExplainedVariance": 1.0 - float((returns.double() - values.double()).var(correction=0)) / spread}


def time_shares(*, generating: float, scoring: float, training: float) -> dict[str, float]:
    """Where the seconds of a step went; the shares add up to 1."""
    spent = {"timeGenerating": generating, "timeScoring": scoring, "timeTraining": training}
    seconds = sum(spent.values())
    return {name: value / seconds for name, value in spent.items()} if seconds > 0 else {}


def held_out_figures(
    *,
    total: Tensor,
    gold: Tensor | None,
    lengths: Sequence[int],
    finished: Sequence[bool],
    prompts: Sequence[str],
) -> dict[str, float]:
    """Figures of the answers to held-out prompts.

    Args:
        total: [n] weighted sum of the rewards that are trained on.
        gold: [n] weighted sum of the gold rewards; None where there are none.
        lengths: [n] tokens.
        finished: [n] whether an answer ended by itself.
        prompts: [n] which prompt was answered: the standard errors are over prompts, not over answers.
    """
    answers = len(prompts)
    _same("answers", answers, total, gold, lengths, finished)
    figures: dict[str, float] = {}
    for name, values in (("goldReward", gold), ("evalReward", total)):
        if values is not None:
            figures[name] = _mean(values)
            if (error := standard_error(values.tolist(), prompts)) is not None:
                figures[f"{name}Error"] = error
    return {
        **figures,
        "evalLength": sum(lengths) / answers,
        "evalMissingEnd": sum(not ended for ended in finished) / answers,
    }


def repetition(ids: Sequence[int], order: int = REPETITION_ORDER) -> float:
    """Share of an answer's n-grams that stood in it before: 1 − different ÷ all; 0 where it has none."""
    grams = _grams(ids, order)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(answers: Sequence[Sequence[int]], order: int) -> float:
    """distinct-n of all answers together (Li et al. 2016): different n-grams ÷ n-grams; 1 where there are none.

    Over all answers, not within each: it falls as well where the policy gives everyone the same answer.
    """
    grams = [gram for ids in answers for gram in _grams(ids, order)]
    return len(set(grams)) / len(grams) if grams else 1.0


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation; None where there are fewer than three pairs or one side does not vary."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


def standard_error(values: Sequence[float], groups: Sequence[str]) -> float | None:
    """Standard error of the mean, where groups and not single values are independent; None for a single group."""
    mean = sum(values) / len(values)
    apart: dict[str, float] = {}
    for value, group in zip(values, groups, strict=True):
        apart[group] = apart.get(group, 0.0) + value - mean
    count = len(apart)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * sum(value**2 for value in apart.values())) / len(values)


def _grams(ids: Sequence[int], order: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[start:] for start in range(order)), strict=False))


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _std(values: Tensor) -> float:
    return float(values.double().std(correction=0))


def _same(what: str, size: int, *parts: Tensor | Sequence[object] | None) -> None:
    sizes = [len(part) for part in parts if part is not None]
    if size == 0 or any(other != size for other in sizes):
        raise ValueError(f"a rollout of {size} {what} has parts of {sizes} {what}")
