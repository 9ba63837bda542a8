"""The stages of a pipeline as lines for people, from status alone or with what a local run knows besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

from plumbline_api.graph import dependencies
from plumbline_api.names import FINALIZE, PREFLIGHT
from plumbline_api.online import ABORTED_REASON, ONLINE_STAGES
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.stagerun import TrainerStatus
from plumbline_api.status import PipelineStatus, StageStatus

from plumbline_cli.display.words import duration, moment, number

PREFERENCE_FIGURES = ("evalRewardAccuracy", "rewardAccuracy", "loss", "rewardMargin")
KEY_FIGURES: dict[str, tuple[str, ...]] = {
    "pretrain": ("evalLoss", "loss"),
    "sft": ("evalLoss", "loss"),
    "rewardModel": ("accuracy", "calibrationError", "lengthSpearman", "rewardAccuracy", "loss"),
    **dict.fromkeys(("dpo", "kto", "orpo", "simpo", "cpo", "rrhf"), PREFERENCE_FIGURES),
    "merge": ("lostPart", "logitKl", "signConflicts"),
    "evaluate": ("winRate", "preferenceAccuracy", "perplexity"),
}
"""Figures of a stage that are shown on its line, by type, most telling first."""
FIGURES_SHOWN = 3
SPEED = ("tokensPerSecond", "rowsPerSecond")


@dataclass(frozen=True, slots=True)
class StageLine:
    """One stage as it is shown."""

    name: str
    type: str
    phase: str
    seconds: float | None = None
    """Wall time so far, or in all."""
    cached: bool = False
    percentage: int | None = None
    doing: str = ""
    """Such as `step 25/40`."""
    left_seconds: float | None = None
    figures: Sequence[tuple[str, str]] = ()
    reason: str | None = None
    message: str = ""
    waits_for: Sequence[str] = ()
    notes: Sequence[str] = field(default=())

    @property
    def figures_text(self) -> str:
        """`loss 1.84   131 tok/s`."""
        return "   ".join(f"{value} {name}" if "/" in name else f"{name} {value}" for name, value in self.figures)

    @property
    def outcome_text(self) -> str:
        """What to say of a stage that has ended or waits."""
        if self.phase == "Succeeded":
            time = "found in storage" if self.cached else duration(self.seconds) if self.seconds is not None else ""
            if self.reason == ABORTED_REASON:
                return "   ".join(part for part in (time, f"{self.reason}: {self.message}") if part)
            return "   ".join(part for part in (time, "; ".join(self.notes) or self.figures_text) if part)
        if self.phase == "Pending":
            if self.message:
                return self.message
            return f"waits for {', '.join(self.waits_for)}" if self.waits_for else "waits"
        if not self.message and self.reason in (None, self.phase):
            return self.phase.lower()
        return ": ".join(part for part in (self.reason, self.message) if part)


def stage_lines(
    pipeline: AlignmentPipeline | None,
    status: PipelineStatus,
    now: datetime,
    *,
    live: Mapping[str, TrainerStatus] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> list[StageLine]:
    """Every stage in the order it is shown: preflight, the declared ones, finalize where it has begun.

    `live` holds progress that is newer than the status, `notes` remarks of preflight.
    """
    entries = {entry.name: entry for entry in status.stages}
    waits: dict[str, list[str]] = {}
    types: dict[str, str] = {}
    if pipeline is not None:
        for index, stage in enumerate(pipeline.spec.stages):
            waits[stage.name] = dependencies(pipeline.spec, index)
            types[stage.name] = stage.type
    names = list(dict.fromkeys([PREFLIGHT, *types, *entries]))
    names = [name for name in names if name != FINALIZE] + [FINALIZE] * (FINALIZE in entries)
    lines = []
    for name in names:
        entry = entries.get(name) or StageStatus(name=name, type=types.get(name, name))
        undone = [other for other in waits.get(name, ()) if other not in entries or entries[other].phase != "Succeeded"]
        if name not in (PREFLIGHT, FINALIZE) and not undone and not _has_passed(entries, PREFLIGHT):
            undone = [PREFLIGHT]
        lines.append(_line(entry, now, (live or {}).get(name), undone, (notes or {}).get(name, ())))
    return lines


def _has_passed(entries: Mapping[str, StageStatus], name: str) -> bool:
    return name not in entries or entries[name].phase == "Succeeded"


def _line(
    entry: StageStatus, now: datetime, live: TrainerStatus | None, waits_for: Sequence[str], notes: Sequence[str]
) -> StageLine:
    start, end = moment(entry.start_time), moment(entry.completion_time)
    seconds = None if start is None else ((end or now) - start).total_seconds()
    metrics = {metric.name: metric.value for metric in entry.metrics}
    percentage = entry.progress.percentage if entry.progress is not None else None
    doing = entry.progress.message if entry.progress is not None else ""
    left: float | None = None
    if entry.progress is not None and (finish := moment(entry.progress.finish_time)) is not None:
        left = (finish - now).total_seconds()
    running = entry.phase == "Running"
    if live is not None and running:
        metrics = {item["name"]: item["value"] for item in live.metrics}
        percentage, doing = live.progress_percentage, live.message
        left = live.estimated_remaining_seconds
        if left is not None and (told := moment(live.last_updated_time)) is not None:
            left -= (now - told).total_seconds()
    return StageLine(
        name=entry.name,
        type=entry.type,
        phase=entry.phase,
        seconds=seconds,
        cached=entry.cached,
        percentage=percentage if running else None,
        doing=doing if running else "",
        left_seconds=left if running else None,
        figures=_figures(entry.type, metrics, running=running),
        reason=entry.reason,
        message=entry.message or "",
        waits_for=waits_for,
        notes=notes,
    )


def _figures(type_: str, metrics: Mapping[str, str], *, running: bool) -> list[tuple[str, str]]:
    if type_ in ONLINE_STAGES:
        return _course(metrics)
    found: list[tuple[str, str]] = []
    # A line of a running stage has a bar as well: what moves most is enough.
    wanted = (
        ["loss", *SPEED] if running and "loss" in metrics else ("suggestedLearningRate", *KEY_FIGURES.get(type_, ()))
    )
    for name in wanted:
        if name in metrics and len(found) < FIGURES_SHOWN:
            shown = _number(metrics[name])
            if name in SPEED:
                found.append(("tok/s" if name == "tokensPerSecond" else "rows/s", shown))
            elif f"{name}.lower" in metrics and f"{name}.upper" in metrics:
                bounds = f"[{_number(metrics[f'{name}.lower'])}, {_number(metrics[f'{name}.upper'])}]"
                found.append((_words(name), f"{shown} {bounds}"))
            else:
                found.append((_words(name), shown))
    return found


def _course(metrics: Mapping[str, str]) -> list[tuple[str, str]]:
    """How a stage that samples fares: `reward 0.9 → 1.6   KL 4.1   length +3 %`."""
    found: list[tuple[str, str]] = []
    if "reward" in metrics:
        start = f"{_number(metrics['rewardStart'])} → " if "rewardStart" in metrics else ""
        found.append(("reward", f"{start}{_number(metrics['reward'])}"))
    if "kl" in metrics:
        found.append(("KL", _number(metrics["kl"])))
    with suppress(KeyError, ValueError):
        found.append(("length", f"{100 * (float(metrics['length.growth']) - 1):+.0f} %".replace("-", "−")))
    return found


def _number(text: str) -> str:
    try:
        return number(float(text))
    except ValueError:
        return text


def _words(name: str) -> str:
    """`preferenceAccuracy` as `preference accuracy`, `evalLoss` as `held-out loss`."""
    name = f"heldOut{name[4:]}" if name.startswith("eval") else name
    return (
        "".join(f" {c.lower()}" if c.isupper() else c for c in name)
        .replace("held out", "held-out")
        .replace(" kl", " KL")
    )
