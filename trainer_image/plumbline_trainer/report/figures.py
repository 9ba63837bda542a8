"""The figures that decide, from the evaluations: one row per metric, one column per model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from plumbline_trainer.report.facts import RunFacts, StageFacts

Direction = Literal["better", "worse", "unclear"]

BASE = "base"
DECIDING = ("winRate", "preferenceAccuracy", "perplexity")
"""Kinds of suites, the one that says most first."""


@dataclass(frozen=True)
class Value:
    """A figure with its interval, where it has one."""

    value: float
    lower: float | None = None
    upper: float | None = None


@dataclass
class Finding:
    """What one suite found about one policy."""

    stage: str
    """The evaluate stage."""
    kind: str
    metric: str
    dataset: str
    split: str
    policy: str
    baseline: str
    value: Value
    baseline_value: Value | None
    change: Value | None
    """Difference (accuracy) or ratio (perplexity) to the baseline."""
    direction: Direction
    prompts: int
    confidence: float
    judge: str | None = None
    in_sample: list[str] = field(default_factory=list)
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name for people."""
        name = {
            "winRate": f"win rate against {self.baseline}",
            "preferenceAccuracy": "preference accuracy",
            "perplexity": "perplexity",
        }[self.kind]
        return name if "." not in self.metric else f"{name} ({self.dataset})"

    @property
    def lower_is_better(self) -> bool:
        """Whether less is more."""
        return self.kind == "perplexity"


def find(facts: RunFacts) -> list[Finding]:
    """Every finding of every evaluation, the kinds that say most first; of one kind in declared order."""
    found = [finding for stage in facts.evaluations for finding in _of_stage(stage)]
    return sorted(found, key=lambda finding: DECIDING.index(finding.kind))


def _of_stage(stage: StageFacts) -> Iterator[Finding]:
    document = stage.evaluation or {}
    names = [str(document.get(side, {}).get("name", side)) for side in ("policy", "baseline")]
    for suite in document.get("suites", []):
        kind = suite.get("kind")
        value = _value(suite.get("estimate"))
        if kind not in DECIDING or value is None:
            continue
        change = _value(suite.get("change"))
        yield Finding(
            stage=stage.name,
            kind=kind,
            metric=str(suite.get("metric", kind)),
            dataset=str(suite.get("dataset", "")),
            split=str(suite.get("split", "")),
            policy=names[0],
            baseline=names[1],
            value=value,
            baseline_value=_value(suite.get("baseline")),
            change=change,
            direction=_direction(kind, value, change),
            prompts=int(suite.get("estimate", {}).get("prompts", 0)),
            confidence=float(document.get("confidence", 0.95)),
            judge=_judge(suite.get("judge")),
            in_sample=list(suite.get("inSample", [])),
            document=suite,
        )


def _direction(kind: str, value: Value, change: Value | None) -> Direction:
    """Better or worse only where the whole interval says so."""
    measured, level = (value, 0.5) if kind == "winRate" else (change, 1.0 if kind == "perplexity" else 0.0)
    if measured is None or measured.lower is None or measured.upper is None:
        return "unclear"
    above, below = measured.lower > level, measured.upper < level
    if kind == "perplexity":
        above, below = below, above
    return "better" if above else "worse" if below else "unclear"


def _value(item: Any) -> Value | None:
    if not isinstance(item, dict) or item.get("value") is None:
        return None
    return Value(float(item["value"]), item.get("lower"), item.get("upper"))


def _judge(item: Any) -> str | None:
    if not isinstance(item, dict):
        return None
    words = {"rule": "rule", "reward": "reward model"}
    kind = words.get(str(item.get("kind")))
    return f"model {item.get('text')}" if kind is None else f"{kind} “{item['text']}”"


@dataclass
class Table:
    """Metrics by model."""

    columns: list[str]
    rows: list[dict[str, Any]]
    """`metric`, `label`, `better`, `note`, and `values` by column."""


def tabulate(facts: RunFacts, findings: list[Finding]) -> Table:
    """One row per metric and dataset, one column per model in order of training, the base first."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    columns: list[str] = []
    for finding in findings:
        key: tuple[str, ...] = (finding.kind, finding.dataset, finding.split, finding.judge or "", finding.metric)
        if finding.kind == "winRate":
            key = (*key, finding.baseline)
        row = rows.setdefault(
            key,
            {
                "metric": finding.metric,
                "kind": finding.kind,
                "label": finding.label,
                "dataset": finding.dataset,
                "split": finding.split,
                "better": "lower" if finding.lower_is_better else "higher",
                "confidence": finding.confidence,
                "prompts": finding.prompts,
                "values": {},
            },
        )
        if finding.judge is not None:
            row["judge"] = finding.judge
        if finding.in_sample:
            row["inSample"] = finding.in_sample
        row["values"][finding.policy] = _wire(finding.value) | {"direction": finding.direction}
        if finding.baseline_value is not None:
            row["values"].setdefault(finding.baseline, _wire(finding.baseline_value))
        columns += [name for name in (finding.baseline, finding.policy) if name not in columns]
    order = [BASE, *(stage.name for stage in facts.stages)]
    columns.sort(key=lambda name: order.index(name) if name in order else len(order))
    return Table(columns, list(rows.values()))


def _wire(value: Value) -> dict[str, float]:
    found = {"value": value.value, "lower": value.lower, "upper": value.upper}
    return {name: number for name, number in found.items() if number is not None}
