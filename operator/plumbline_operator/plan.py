"""The one decision: from everything that is known to everything that is to be done. Pure; see docs/conditions.md.

The order of a pass: accept the spec, count what the attempts tell, apply a retry, skip what cannot run, stop what is
no longer wanted, suspend or start, finalize, then say where the run stands.
"""

from __future__ import annotations

from datetime import datetime

from plumbline_api.names import PREFLIGHT
from plumbline_api.record import StageRecord
from plumbline_api.status import Metric

from plumbline_operator.conclusion import conclude, refusal
from plumbline_operator.draft import Draft, begin, renewed
from plumbline_operator.policies.acceptance import Refused, accept
from plumbline_operator.policies.findings import read_findings
from plumbline_operator.policies.gates import gate_problem, read
from plumbline_operator.policies.identity import LIVE_PHASES, attempts_of, is_over
from plumbline_operator.policies.ordering import PREFLIGHT_FAILED, waiting_again, with_skips
from plumbline_operator.policies.retries import retry_effect
from plumbline_operator.policies.settlement import Rules, settle
from plumbline_operator.settings import PlanSettings
from plumbline_operator.snapshot import FreezeRecord, Plan, PlannedEvent, Snapshot, StopStage
from plumbline_operator.stageruns import output_uri
from plumbline_operator.starting import resume_attempts, start_preflight, start_stages, suspend_attempts, wrap_up

__all__ = ["PlanSettings", "plan"]


def plan(snapshot: Snapshot, settings: PlanSettings, now: datetime) -> Plan:
    """What to do now. Carrying the plan out and planning again at the same moment gives an empty plan.

    Args:
        snapshot: Everything that is known.
        settings: Numbers that steer decisions.
        now: The time, with a time zone.
    """
    if snapshot.deleting:
        return Plan()  # owner references take the jobs along; storage keeps what is there
    accepted = accept(snapshot, settings)
    if isinstance(accepted, Refused):
        return refusal(snapshot, settings, now, accepted)
    draft = begin(snapshot, settings, now, accepted)
    if accepted.is_new:
        draft.actions.append(FreezeRecord(accepted.record))
    _settle_preflight(draft)
    _settle_stages(draft)
    _apply_retry(draft)
    _skip(draft)
    _stop_outdated(draft)
    if draft.suspended:
        suspend_attempts(draft)
    else:
        resume_attempts(draft)
        start_preflight(draft)
        start_stages(draft)
    wrap_up(draft)
    return conclude(draft)


def _settle_preflight(draft: Draft) -> None:
    attempts = attempts_of(draft.snapshot, roles=["preflight"], stage=PREFLIGHT, fingerprint=draft.identity)
    rules = Rules(retries=draft.settings.implicit_retries)
    settled = settle(draft.entries[PREFLIGHT], attempts, rules, draft.settings, draft.now)
    draft.entries[PREFLIGHT] = settled.entry
    draft.wakes.extend(settled.wakes)
    if settled.finished is not None:
        findings = read_findings(settled.finished.result, draft.record)
        if isinstance(findings, str):
            draft.update(PREFLIGHT, phase="Failed", reason="RuntimeTooOld", message=findings)
            return
        draft.pins, draft.cached = list(findings.pins), findings.cached
        draft.update(PREFLIGHT, message="; ".join(findings.notes) or settled.entry.message)
    elif settled.entry.phase == "Succeeded" and draft.fingerprints() is None:
        draft.entries[PREFLIGHT] = waiting_again(settled.entry)  # its pins are lost; it runs again


def _settle_stages(draft: Draft) -> None:
    fingerprints = draft.fingerprints()
    recover: set[str] = set()
    for stage in draft.record.stages:
        if fingerprints is not None:
            _adopt_fingerprint(draft, stage, fingerprints[stage.name])
        entry = draft.entries[stage.name]
        if entry.fingerprint is None:
            continue
        attempts = attempts_of(
            draft.snapshot, roles=["stage", "collect"], stage=stage.name, fingerprint=entry.fingerprint
        )
        rules = Rules(
            retries=stage.retries,
            gates=stage.gates,
            timeout_seconds=stage.timeout_seconds,
            output_uri=output_uri(draft.record, stage, entry.fingerprint),
            recoverable=bool(draft.order.reads[stage.name]),
        )
        settled = settle(entry, attempts, rules, draft.settings, draft.now)
        draft.entries[stage.name] = settled.entry
        draft.wakes.extend(settled.wakes)
        if settled.recover:
            recover |= draft.order.producers(stage.name)
    for name in draft.order.names:
        if name in recover and draft.entries[name].phase == "Succeeded":
            # Every producer of the chain looks at its own output: one that is whole exits at once.
            draft.entries[name] = waiting_again(draft.entries[name])
            draft.update(name, cached=False, reason="OutputMissing", message="its output is checked and computed again")


def _adopt_fingerprint(draft: Draft, stage: StageRecord, fingerprint: str) -> None:
    """Start anew where the work has changed; after a new preflight look at what stays in its light."""
    entry = draft.entries[stage.name]
    is_cached = draft.cached is not None and stage.name in draft.cached
    if entry.fingerprint != fingerprint:
        draft.entries[stage.name] = renewed(draft, stage, fingerprint, cached=is_cached)
    elif draft.cached is None or entry.phase in LIVE_PHASES:
        return
    elif entry.phase != "Succeeded":
        draft.update(stage.name, cached=is_cached)
    elif entry.output is None or entry.output.uri != output_uri(draft.record, stage, fingerprint):
        draft.entries[stage.name] = waiting_again(entry)  # storage has moved
        draft.update(stage.name, cached=is_cached)
    elif stage.gates and not _gates_hold(stage, entry.metrics):
        draft.entries[stage.name] = waiting_again(entry)  # gates were edited: its result is read and judged again
        draft.update(stage.name, cached=is_cached)


def _gates_hold(stage: StageRecord, metrics: list[Metric]) -> bool:
    return gate_problem(stage.gates, read(metrics)) is None


def _apply_retry(draft: Draft) -> None:
    request = draft.pipeline.spec.retry
    if request is None or request.nonce == draft.old.retry_nonce:
        return
    draft.retry_nonce = request.nonce
    if draft.old.start_time is None:
        return  # set when the pipeline was made: nothing has run yet
    effect = retry_effect(request, draft.entries, draft.order)
    for name in effect.reset:
        draft.entries[name] = waiting_again(draft.entries[name])
    if effect.ignored is not None:
        draft.events.append(PlannedEvent("Warning", "RetryIgnored", effect.ignored))
    elif effect.reset:
        draft.events.append(PlannedEvent("Normal", "Retrying", f"starting again: {', '.join(sorted(effect.reset))}"))
    elif not any(entry.phase == "Skipped" for entry in draft.stages):
        draft.events.append(PlannedEvent("Warning", "RetryIgnored", "no stage has failed, there is nothing to retry"))


def _skip(draft: Draft) -> None:
    if draft.entries[PREFLIGHT].phase == "Failed":
        skipped = {
            "phase": "Skipped",
            "reason": PREFLIGHT_FAILED,
            "message": "not started, because preflight failed",
            "progress": None,
        }
        draft.each(lambda entry: entry.model_copy(update=skipped), "Pending", *LIVE_PHASES)
        return
    for entry in draft.stages:
        if entry.phase == "Skipped" and entry.reason == PREFLIGHT_FAILED:
            draft.entries[entry.name] = waiting_again(entry)
    draft.entries |= with_skips({entry.name: entry for entry in draft.stages}, draft.order)


def _stop_outdated(draft: Draft) -> None:
    """Stop attempts at what is no longer wanted. While a new preflight runs, what runs may still be wanted."""
    fingerprints = draft.fingerprints()
    has_failed = draft.entries[PREFLIGHT].phase == "Failed"
    for job in draft.snapshot.jobs:
        if not job.owned or job.deleting or is_over(job) or job.role == "finalize":
            continue
        if job.role == "preflight":
            if job.fingerprint != draft.identity:
                draft.actions.append(StopStage(job.name, "the spec was edited"))
        elif has_failed:
            draft.actions.append(StopStage(job.name, "preflight failed"))
        elif fingerprints is not None and fingerprints.get(job.stage) != job.fingerprint:
            draft.actions.append(StopStage(job.name, "the spec was edited"))
            draft.events.append(
                PlannedEvent("Normal", "StageStopped", f"{job.stage}: {job.name} computes what is no longer asked for")
            )
