"""The order of stages: who waits for whom, who is skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plumbline_api.record import RunRecord
from plumbline_api.status import StageStatus

DEPENDENCY_FAILED = "DependencyFailed"
PREFLIGHT_FAILED = "PreflightFailed"


@dataclass(frozen=True, slots=True)
class Order:
    """The graph of a record."""

    names: tuple[str, ...]
    """Stages, each after those it depends on; declared order where that leaves a choice."""
    before: Mapping[str, tuple[str, ...]]
    """What each stage waits for."""
    reads: Mapping[str, tuple[str, ...]]
    """Stages whose output each stage reads."""

    def ancestors(self, name: str) -> set[str]:
        """Every stage that must have succeeded before this one."""
        return _closure(name, self.before)

    def producers(self, name: str) -> set[str]:
        """Every stage whose output this one reads, directly or through an adapter's parents."""
        return _closure(name, self.reads)

    def dependants(self, name: str) -> set[str]:
        """Every stage that waits for this one."""
        return {other for other in self.names if name in self.ancestors(other)}


def order_of(record: RunRecord) -> Order:
    """The graph of a record; it has no cycles, the checker has seen to that."""
    before = {stage.name: tuple(stage.depends_on) for stage in record.stages}
    reads = {
        stage.name: tuple(dict.fromkeys(ref.stage for ref in stage.inputs if ref.stage is not None))
        for stage in record.stages
    }
    sorted_names: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in sorted_names:
            for other in before[name]:
                visit(other)
            sorted_names[name] = None

    for stage in record.stages:
        visit(stage.name)
    return Order(tuple(sorted_names), before, reads)


def _closure(name: str, edges: Mapping[str, Sequence[str]]) -> set[str]:
    found: set[str] = set()
    pending = list(edges[name])
    while pending:
        other = pending.pop()
        if other not in found:
            found.add(other)
            pending.extend(edges[other])
    return found


def with_skips(entries: Mapping[str, StageStatus], order: Order) -> dict[str, StageStatus]:
    """Entries in which stages after a failed one are skipped, and stages wait again that no longer have to be.

    Only what depends on a failed stage is skipped: independent stages go on, whether they have started or not, so
    that how a run ends does not depend on which of two events was seen first. Their outputs stay for a retry.
    """
    found = dict(entries)
    for name in order.names:
        entry = found[name]
        culprits = [other for other in order.before[name] if found[other].phase in ("Failed", "Skipped")]
        if entry.phase in ("Pending", "Skipped") and culprits:
            roots = [
                other for other in order.names if other in order.ancestors(name) and found[other].phase == "Failed"
            ]
            failed = ", ".join(roots or culprits)
            found[name] = entry.model_copy(
                update={
                    "phase": "Skipped",
                    "reason": DEPENDENCY_FAILED,
                    "message": f"not started, because {failed} failed",
                    "progress": None,
                }
            )
        elif entry.phase == "Skipped" and entry.reason != PREFLIGHT_FAILED:
            found[name] = waiting_again(entry)
    return found


def waiting_again(entry: StageStatus) -> StageStatus:
    """An entry that starts anew with its next attempt; what has been used stays counted."""
    return entry.model_copy(
        update={
            "phase": "Pending",
            "reason": None,
            "message": None,
            "failures": 0,
            "recoveries": 0,
            "completion_time": None,
            "progress": None,
            "output": None,
        }
    )
