"""What a stage over given rows says of itself at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from plumbline_api.training import Training

from plumbline_trainer.engine.schedule import StepPlan
from plumbline_trainer.engine.state import TrainingState


def closing_figures(
    state: TrainingState, plan: StepPlan, training: Training, penalties: Sequence[str], counts: Mapping[str, float]
) -> dict[str, float]:
    """Figures, the deciding ones first, because not all of them travel (`METRICS_MAX`): evaluations, means over the
    last steps, totals.

    Args:
        state: Of the run.
        plan: Its steps.
        training: Optimisation parameters.
        penalties: Names of what holds weights.
        counts: What became of rows and weights; they stand before what only tells how the stage went.
    """
    # Not every step has every figure: a batch may hold answers of one kind only.
    found = {name: [item[name] for item in state.recent if name in item] for item in state.recent for name in item}
    means = {name: sum(values) / len(values) for name, values in found.items()}
    # The figures of a stage are those of the weights that it yields.
    latest, start, best = state.selected or state.latest, state.start, state.best
    known = {
        "loss": means.get("loss"),
        "evalLoss": latest.get("evalLoss"),
        "evalLossStart": start.get("evalLoss"),
        "evalRewardAccuracy": latest.get("evalRewardAccuracy"),
        "evalRewardMargin": latest.get("evalRewardMargin"),
        "selectedStep": state.selected.get("step"),
        "stoppedEarly": float(bool(state.ended)) if training.early_stopping is not None else None,
        "kl": means.get("kl"),
        "rehearsalLoss": means.get("rehearsalLoss"),
        **{name: means.get(name) for name in penalties},
        **counts,
        "rewardAccuracy": means.get("rewardAccuracy"),
        "rewardMargin": means.get("rewardMargin"),
        "steps": float(state.step),
        "plainPath": float(state.path == "plain"),
        "tokensPerSecond": means.get("tokensPerSecond"),
        "gradientNorm": means.get("gradientNorm"),
        "epochs": round(plan.epoch(state.step), 4),
        "tokens": float(state.tokens),
        "evalLossBest": best.get("evalLoss"),
        "evalLossBestStep": best.get("step"),
    }
    return {name: value for name, value in known.items() if value is not None}
