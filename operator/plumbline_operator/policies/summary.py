"""The columns of `kubectl get alp`: one line that says where a run stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from plumbline_api.artifacts import ArtifactKind
from plumbline_api.names import FINALIZE, PREFLIGHT
from plumbline_api.record import RunRecord
from plumbline_api.stagerun import StageOutcome
from plumbline_api.stages import yields_of
from plumbline_api.status import ModelOutput, PipelinePhase, StageStatus

from plumbline_operator.policies.clock import parse_time, shorten
from plumbline_operator.policies.conditions import ENDED, FAILED, Situation
from plumbline_operator.policies.identity import LIVE_PHASES

TERMINAL_PHASES = frozenset({"Succeeded", "Failed", "Skipped"})
OUTCOME_MESSAGE_MAX = 300


def phase_of(situation: Situation, *, is_started: bool) -> PipelinePhase:
    """The word for people."""
    if situation is Situation.REFUSED:
        return "Refused"
    if situation is Situation.SUSPENDED:
        return "Suspended"
    if situation in ENDED:
        return "Failed" if situation in FAILED else "Succeeded"
    if situation is Situation.PREFLIGHT:
        return "Preflight" if is_started else "Pending"
    return "Running"


def stage_column(situation: Situation, entries: Sequence[StageStatus]) -> str | None:
    """The stage under way and its place, such as `dpo (2/4)`; `+1` where more run beside it."""
    total = len(entries)
    ended = sum(entry.phase in TERMINAL_PHASES for entry in entries)
    if situation is Situation.PREFLIGHT:
        return PREFLIGHT
    if situation is Situation.FINALIZING:
        return FINALIZE
    if situation in ENDED:
        failed = next((entry.name for entry in entries if entry.phase == "Failed"), None)
        done = sum(entry.phase == "Succeeded" for entry in entries)
        return f"{failed} ({done}/{total})" if failed is not None else f"{done}/{total}"
    live = [entry for entry in entries if entry.phase in LIVE_PHASES]
    live.sort(key=lambda entry: entry.phase != "Running")
    chosen = live or [entry for entry in entries if entry.phase == "Pending"]
    if not chosen:
        return None
    beside = f" +{len(live) - 1}" if len(live) > 1 else ""
    return f"{chosen[0].name}{beside} ({min(ended + 1, total)}/{total})"


def progress_column(entries: Sequence[StageStatus]) -> str | None:
    """Share of the running stage that is done."""
    first = next((entry.progress for entry in entries if entry.phase == "Running" and entry.progress), None)
    return None if first is None else f"{first.percentage}%"


def eta(entries: Sequence[StageStatus]) -> str | None:
    """When the last of the running stages is expected to end."""
    times = [e.progress.finish_time for e in entries if e.progress is not None and e.progress.finish_time is not None]
    return max(times, key=parse_time, default=None)


def last_model(record: RunRecord, entries: Mapping[str, StageStatus]) -> ModelOutput | None:
    """The last policy, in declared order, that a succeeded stage yielded."""
    for stage in reversed(record.stages):
        entry = entries[stage.name]
        if (
            entry.phase == "Succeeded"
            and entry.output
            and yields_of(stage.type, stage.parameters) is ArtifactKind.POLICY
        ):
            return ModelOutput(stage=stage.name, uri=entry.output.uri, digest=entry.output.digest)
    return None


def failure_words(entries: Sequence[StageStatus]) -> tuple[str, str] | None:
    """Reason and message of a run that failed: the first failed stage in declared order, in the trainer's own words."""
    failed = [entry for entry in entries if entry.phase == "Failed"]
    if not failed:
        return None
    first = failed[0]
    others = f" (failed as well: {', '.join(entry.name for entry in failed[1:])})" if failed[1:] else ""
    return first.reason or "Failed", f"{first.name}: {first.reason}: {first.message or 'no message'}{others}"


def outcomes_of(entries: Sequence[StageStatus]) -> list[StageOutcome]:
    """How the stages ended, for finalize; messages are cut so that all of them fit its document."""
    return [
        StageOutcome(
            name=entry.name,
            type=entry.type,
            phase=entry.phase,
            fingerprint=entry.fingerprint,
            reason=entry.reason,
            message=shorten(entry.message, OUTCOME_MESSAGE_MAX) if entry.message else None,
            cached=entry.cached,
            attempts=entry.attempt,
            seconds=_seconds(entry),
            gpu_seconds=entry.gpu_seconds,
        )
        for entry in entries
    ]


def _seconds(entry: StageStatus) -> float | None:
    if entry.start_time is None or entry.completion_time is None:
        return None
    return max((parse_time(entry.completion_time) - parse_time(entry.start_time)).total_seconds(), 0.0)
