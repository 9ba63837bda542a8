"""Curves of the stages that sample answers: rewards, KL, length, time, and what the reward cost in KL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from plumbline_api.watched import REWARD_PREFIX

from plumbline_trainer.report.curves import (
    FIRST,
    INK,
    SECOND,
    SMOOTH_FROM,
    Figure,
    Panel,
    canvas_of,
    draw_panels,
    rendered,
    smoothed,
)
from plumbline_trainer.report.facts import Point, series

UNIT = "step (a rollout and the updates on it)"
PANELS = (
    Panel("Gold reward on held-out prompts", None, "goldReward", unit=UNIT),
    Panel("KL to the reference, per answer", "kl", reference=0.0, unit=UNIT),
    Panel("Entropy per token", "entropy", unit=UNIT),
    Panel("Length of answers, in tokens", "length.mean", "evalLength", unit=UNIT),
    Panel("Repeated 3-grams within answers", "repetition", unit=UNIT),
    Panel("Clipped ratios", "clipFraction", unit=UNIT),
    Panel("Variance of returns that the critic explains", "valueExplainedVariance", reference=0.0, unit=UNIT),
    Panel("Answers that turn to the user's opinion", None, "sycophancy", unit=UNIT),
)
TIMES = (("timeGenerating", "sampling"), ("timeScoring", "scoring"), ("timeTraining", "training"))


def draw_rollouts(stage: str, points: Sequence[Point]) -> list[Figure]:
    """Every plot that the stage's figures allow: the reward and its parts first, then what it cost."""
    reward = Panel("Reward", "reward", "evalReward", unit=UNIT)
    return [
        *draw_panels(stage, (reward,), points),
        *draw_frontier(stage, points),
        *draw_panels(stage, (*_components(points), *PANELS), points),
        *draw_times(stage, points),
    ]


def _components(points: Sequence[Point]) -> list[Panel]:
    """A plot for each reward, where there are several: their units differ."""
    names = sorted({name for point in points for name in point.metrics if name.startswith(REWARD_PREFIX)})
    if len(names) < 2:
        return []
    return [Panel(f"Reward “{name.removeprefix(REWARD_PREFIX)}”", name, unit=UNIT) for name in names]


def draw_frontier(stage: str, points: Sequence[Point]) -> Iterator[Figure]:
    """Reward over KL, in the order of the steps: where KL goes on growing and the reward does not, it costs more than
    it gives; where only the reward in training still grows, it is being overfitted (Gao et al. 2023)."""
    steps, (kls, rewards) = _together(points, "kl", "reward")
    if len(kls) < 2:
        return
    evaluated, held_out = series(points, "evalReward")
    # The KL at an evaluation is that of the rollout nearest to it.
    nearest = [kls[min(range(len(steps)), key=lambda index: abs(steps[index] - step))] for step in evaluated]
    name = f"{stage}-frontier"
    with canvas_of(name) as (canvas, axes):
        smooth = len(kls) >= SMOOTH_FROM
        axes.plot(kls, rewards, color=FIRST, linewidth=1.2, alpha=0.25 if smooth else 1.0)
        if smooth:
            axes.plot(smoothed(kls), smoothed(rewards), color=FIRST, linewidth=2.0)
        if held_out:
            axes.plot(nearest, held_out, color=SECOND, linewidth=1.6, marker="o", markersize=5)
        axes.set_xlabel("KL to the reference, per answer")
        svg = rendered(canvas, name)
    title = "Reward over KL"
    ends = f"{rewards[0]:.3g} at KL {kls[0]:.3g}, {rewards[-1]:.3g} at KL {kls[-1]:.3g}"
    yield Figure(title, svg, f"{title}: {ends}")


def draw_times(stage: str, points: Sequence[Point]) -> Iterator[Figure]:
    """Where the time of each step went, as shares that add up to 1."""
    steps, shares = _together(points, *(name for name, _ in TIMES))
    if len(steps) < 2:
        return
    name = f"{stage}-times"
    with canvas_of(name) as (canvas, axes):
        axes.stackplot(steps, *shares, colors=[FIRST, SECOND, INK], alpha=0.75, linewidth=0)
        level = 0.0
        for (_, word), values in zip(TIMES, shares, strict=True):
            middle = sum(values) / len(values)
            if middle >= 0.08:
                at = (steps[0] + steps[-1]) / 2
                axes.text(at, level + middle / 2, word, ha="center", va="center", color="white", fontweight="bold")
            level += middle
        axes.set_ylim(0, 1)
        axes.set_xlabel(UNIT)
        svg = rendered(canvas, name)
    title = "Where the time went"
    said = ", ".join(f"{sum(v) / len(v):.0%} {word}" for (_, word), v in zip(TIMES, shares, strict=True))
    yield Figure(title, svg, f"{title}: {said}")


def _together(points: Sequence[Point], *names: str) -> tuple[list[int], list[list[float]]]:
    """Steps that reported all of some figures, and the values of each."""
    chosen = [point for point in points if all(name in point.metrics for name in names)]
    return [point.step for point in chosen], [[point.metrics[name] for point in chosen] for name in names]
