"""A training stage in the report: its curves, its figures, and what befell its rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from plumbline_api.online import ONLINE_STAGES

from plumbline_trainer.report import words
from plumbline_trainer.report.curves import Figure, draw_curves, draw_range_test, draw_reliability
from plumbline_trainer.report.facts import StageFacts
from plumbline_trainer.report.rollouts import draw_rollouts


@dataclass
class Training:
    """A training stage's curves and figures."""

    name: str
    type: str
    figures: list[Figure]
    numbers: list[tuple[str, str]]
    held_out: bool = False
    """Whether held-out rows were measured on the way."""
    remarks: list[str] = field(default_factory=list)


NUMBERS = (
    ("accuracy", "accuracy on held-out rows"),
    ("accuracy.lower", "its interval from"),
    ("accuracy.upper", "to"),
    ("calibrationError", "calibration error"),
    ("lengthPearson", "correlation with length (Pearson)"),
    ("lengthSpearman", "correlation with length (Spearman)"),
    ("disagreement", "disagreement of the heads"),
    ("evalLossStart", "held-out loss at the start"),
    ("evalLoss", "held-out loss at the end"),
    ("loss", "training loss, last steps"),
    ("rewardAccuracy", "preferences met, last steps"),
    ("evalRewardAccuracy", "preferences met, held out"),
    ("answers", "answers"),
    ("effectiveAnswers", "answers that their weights amount to"),
    ("winners", "answers imitated"),
    ("rewardBest", "reward of each prompt's best answer"),
    ("rewardStart", "reward at the start"),
    ("reward", "reward, last steps"),
    ("evalRewardStart", "reward on held-out prompts at the start"),
    ("evalReward", "reward on held-out prompts at the end"),
    ("goldRewardStart", "gold reward at the start"),
    ("goldReward", "gold reward at the end"),
    ("length.growth", "length of answers against the start"),
    ("entropy", "entropy per token"),
    ("repetition", "repeated 3-grams within answers"),
    ("missingEnd", "answers without an end"),
    ("rewardLengthCorrelation", "rank correlation of reward and length"),
    ("sycophancy", "answers that turn to the user's opinion"),
    ("sycophancy.lower", "its interval from"),
    ("sycophancy.upper", "to"),
    ("suggestedLearningRate", "suggested learning rate"),
    ("selectedStep", "step whose weights were kept"),
    ("tokensPerSecond", "tokens per second"),
    ("lostPart", "part of the change lost by rounding"),
)
"""Figures of training stages, and what they are called."""


def _figures(stage: StageFacts) -> list[Figure]:
    """The curves of a training stage; of a range test its one plot."""
    if stage.record.type in ONLINE_STAGES:
        return draw_rollouts(stage.name, stage.points)
    if stage.record.parameters["training"].get("rangeTest") is None:
        return draw_curves(stage.name, stage.record.type, stage.points, stage.record.parameters)
    swept = [item.metrics for item in stage.points if {"learningRate", "loss"} <= item.metrics.keys()]
    if len(swept) < 2:
        return []
    rates, losses = [item["learningRate"] for item in swept], [item["loss"] for item in swept]
    return [draw_range_test(stage.name, rates, losses, stage.metrics.get("suggestedLearningRate"))]


def training_of(stage: StageFacts) -> Training | None:
    """What the report shows of a stage that trained; None for others, and where it left nothing."""
    if "training" not in stage.record.parameters:
        return None
    figures = _figures(stage)
    if stage.held_out is not None:
        reliability = draw_reliability(stage.name, stage.held_out.get("calibration") or {})
        figures += [] if reliability is None else [reliability]
    numbers = [(label, words.number(stage.metrics[key])) for key, label in NUMBERS if key in stage.metrics]
    if not figures and not numbers:
        return None
    remarks = [f"aborted: {stage.aborted}"] if stage.aborted is not None else []
    if stage.monitors is not None:
        remarks.append(str(stage.monitors.get("text")))
    if (dropped := stage.metrics.get("droppedRows", 0)) > 0:
        remarks.append(f"{words.number(dropped)} rows were left out: no token of the answer fits maxLength")
    if (cut := stage.metrics.get("truncatedRows", 0)) > 0:
        remarks.append(f"{words.number(cut)} rows were cut at maxLength; the model does not learn an end from them")
    if stage.metrics.get("plainPath"):
        remarks.append("the packed path did not agree with the plain one on this model, so the plain one was used")
    held_out = any(name.startswith("eval") for point in stage.points for name in point.metrics)
    return Training(stage.name, stage.record.type, figures, numbers, held_out, remarks)
