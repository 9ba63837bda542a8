"""Figures of the stages that sample answers: their names, what they mean, and which a stage measures."""

from __future__ import annotations

from collections.abc import Mapping

from plumbline_api.online import OnlineStage, Ppo

ROLLOUT_FIGURES: dict[str, str] = {
    "reward": "mean over answers of the weighted sum of all rewards",
    "kl": "log π − log π_ref, summed over an answer, mean over answers",
    "length.growth": "mean length of answers ÷ that of the first three rollouts",
    "entropy": "of the policy's choice of a token, in nats, mean over tokens",
    "repetition": "share of an answer's 3-grams that stood in it before, mean over answers",
    "rewardStart": "mean reward of the first three rollouts",
    "score": "what is learnt from: the reward after missingEndPenalty and scoreClip, mean over answers",
    "rewardStd": "standard deviation of the reward over answers",
    "klPerToken": "log π − log π_ref, mean over tokens",
    "length.mean": "tokens of an answer, its end token included, mean over answers",
    "missingEnd": "share of answers that reached maxNewTokens without an end",
    "rewardLengthCorrelation": "Spearman's ρ of reward and length over the answers of a rollout",
    "distinct1": "different tokens ÷ tokens, over all answers of a rollout",
    "distinct2": "different pairs of neighbours ÷ such pairs, over all answers of a rollout",
}
"""Measured when a rollout is scored, before anything is learnt from it: they speak of the weights that sampled."""

UPDATE_FIGURES: dict[str, str] = {
    "clipFraction": "share of tokens (rloo: answers) where the ratio was clipped, over all updates of a step",
    "ratioAtStart": "mean |new ÷ old probability − 1| before the first update of a step; 0 but for rounding",
    "gradientNorm": "of the policy before clipping, mean over the updates of a step",
    "loss": "what is minimised, mean over the updates of a step",
    "klLoss": "KL as a term of the loss, mean over tokens; grpo with kl.coefficient above 0",
    "klCoefficient": "β, where it is not 0",
    "learningRate": "of the policy",
    "tokensPerSecond": "tokens of prompts and answers, over the whole step",
    "timeGenerating": "share of a step's time that went into sampling answers",
    "timeScoring": "share of a step's time that went into rewards, reference and values",
    "timeTraining": "share of a step's time that went into updates",
}
"""Measured when a step is done."""

CRITIC_FIGURES: dict[str, str] = {
    "valueExplainedVariance": "1 − Var(returns − values) ÷ Var(returns) over tokens, before the updates",
    "valueLoss": "½ squared error of the critic, mean over tokens and updates",
    "valueClipFraction": "share of tokens whose value was clipped, over all updates of a step",
    "criticGradientNorm": "of the critic before clipping, mean over the updates of a step",
}
"""Measured where there is a critic, when a step is done."""

GOLD_FIGURES: dict[str, str] = {
    "goldReward": "weighted sum of the gold rewards on held-out prompts, mean over answers",
    "goldRewardError": "standard error of goldReward over prompts",
}
HELD_OUT_FIGURES: dict[str, str] = {
    "evalReward": "reward on held-out prompts",
    "evalRewardError": "standard error of evalReward over prompts",
    "evalLength": "mean length of answers to held-out prompts",
    "evalMissingEnd": "missingEnd on held-out prompts",
}
"""Measured at evaluations, where prompts are held out."""
SYCOPHANCY_FIGURES: dict[str, str] = {
    "sycophancy": "share of questions whose preferred answer turns to the one that the user favours",
    "sycophancy.lower": "lower end of its 95 % interval",
    "sycophancy.upper": "upper end of its 95 % interval",
}
"""Measured at evaluations, where the stage has a sycophancy probe."""

FIGURES: dict[str, str] = {
    **ROLLOUT_FIGURES,
    **UPDATE_FIGURES,
    **CRITIC_FIGURES,
    **HELD_OUT_FIGURES,
    **GOLD_FIGURES,
    **SYCOPHANCY_FIGURES,
}
"""Every figure but those of single rewards."""
HEADLINES = (
    "reward",
    "rewardStart",
    "kl",
    "length.growth",
    "evalReward",
    "goldReward",
    "sycophancy",
    "sycophancy.lower",
    "sycophancy.upper",
    "entropy",
    "repetition",
)
"""Figures that people look at first, and that gates ask for."""
RARE_FIGURES = frozenset({**HELD_OUT_FIGURES, **GOLD_FIGURES, **SYCOPHANCY_FIGURES})
"""Figures of evaluations; all others are measured at every step."""
REWARD_PREFIX = "reward."


def component_figure(name: str) -> str:
    """The figure of one reward: its raw values, mean over answers."""
    return f"{REWARD_PREFIX}{name}"


def figures_of(stage: OnlineStage) -> dict[str, str]:
    """The figures that a stage measures, and what they mean."""
    gold = any(reward.gold for reward in stage.rewards)
    components = {
        component_figure(reward.figure): f"reward {reward.figure} before weight and clip, mean over answers"
        for reward in stage.rewards
        if not reward.gold
    }
    return {
        **ROLLOUT_FIGURES,
        **components,
        **UPDATE_FIGURES,
        **(CRITIC_FIGURES if isinstance(stage, Ppo) else {}),
        **HELD_OUT_FIGURES,
        **(GOLD_FIGURES if gold else {}),
        **(SYCOPHANCY_FIGURES if stage.sycophancy is not None else {}),
    }


def needs_held_out(figure: str) -> bool:
    """Whether a figure is measured on held-out prompts only."""
    return figure in HELD_OUT_FIGURES or figure in GOLD_FIGURES


def by_importance(figures: Mapping[str, float]) -> dict[str, float]:
    """The same figures, those that people look at first in front: not all of them travel."""
    ranks = {name: number for number, name in enumerate(dict.fromkeys((*HEADLINES, *FIGURES)))}
    return dict(sorted(figures.items(), key=lambda item: ranks.get(item[0], len(ranks))))


BAR = "\\|"
"""A bar within a table."""
SECTIONS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("When a rollout is scored, of the weights that sampled it", ROLLOUT_FIGURES),
    ("When the updates on a rollout are done", UPDATE_FIGURES),
    ("`ppo` besides", CRITIC_FIGURES),
    ("At evaluations, on held-out prompts", HELD_OUT_FIGURES),
    ("At evaluations, where a reward has `gold: true`", GOLD_FIGURES),
    ("At evaluations, where the stage has `sycophancy`", SYCOPHANCY_FIGURES),
)


def figures_page() -> str:
    """The reference page of the figures."""
    lines = [
        "# Figures of stages that sample",
        "",
        "What `ppo`, `grpo`, `rloo` and `reinforce` measure, and `abortWhen` may name. `reward.NAME` is the mean of one",
        "reward over answers, before weight and clip. Made from `operator/plumbline_api/watched.py`.",
    ]
    for title, figures in SECTIONS:
        rows = [f"| `{name}` | {meaning.replace('|', BAR)} |" for name, meaning in figures.items()]
        lines += ["", f"## {title}", "", "| Figure | Meaning |", "| --- | --- |", *rows]
    return "\n".join(lines) + "\n"
