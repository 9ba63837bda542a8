"""Whether a spec is accepted, and the record that it resolves to."""

from __future__ import annotations

from dataclasses import dataclass

from plumbline_api.check import check
from plumbline_api.errors import ManifestError, Problem
from plumbline_api.permissions import check_permissions
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.record import RunRecord
from plumbline_api.resolve import resolve
from plumbline_api.stagerun import STAGE_RUN_MAX_BYTES

from plumbline_operator.policies.clock import shorten
from plumbline_operator.policies.identity import spec_digest
from plumbline_operator.settings import PlanSettings
from plumbline_operator.snapshot import Snapshot
from plumbline_operator.stageruns import OUTCOMES_RESERVED_BYTES, preflight_run


@dataclass(frozen=True, slots=True)
class Refused:
    """Why nothing is done until the spec (or the runtime) changes."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """A spec and what it resolves to."""

    pipeline: AlignmentPipeline
    record: RunRecord
    is_new: bool
    """Whether the record has to be frozen."""


def accept(snapshot: Snapshot, settings: PlanSettings) -> Refused | Accepted:
    """Take the frozen record of this generation, or resolve one, or say everything that is wrong."""
    pipeline = snapshot.pipeline
    if pipeline is None or snapshot.problems:
        return Refused("InvalidSpec", _joined(snapshot.problems) or "the object does not parse")
    if snapshot.record is not None:
        return Accepted(pipeline, snapshot.record, is_new=False)
    kept = _kept(snapshot, pipeline)
    if kept is not None:
        return Accepted(pipeline, kept, is_new=True)
    runtime = snapshot.runtime
    if snapshot.place == "cluster" and runtime is None:
        problems = check(pipeline, None, place="cluster")
        missing = Problem("spec.runtimeRef", snapshot.runtime_problem or "there is no runtime")
        return Refused("InvalidSpec" if problems else "NoRuntime", _joined((*problems, missing)))
    try:
        record = resolve(
            pipeline,
            runtime,
            operator_version=settings.operator_version,
            place=snapshot.place,
            local_storage=settings.local_storage,
            local_endpoints=settings.local_endpoints,
        )
    except ManifestError as error:
        refusals = check_permissions(pipeline, runtime) if runtime is not None else []
        only_refusals = set(error.problems) <= set(refusals)
        return Refused("NotAllowed" if only_refusals else "InvalidSpec", _joined(error.problems))
    record = record.model_copy(update={"spec_digest": spec_digest(snapshot.body)})
    size = len(preflight_run(record, fingerprint="0" * 64, attempt=1).to_json().encode())
    most = STAGE_RUN_MAX_BYTES - OUTCOMES_RESERVED_BYTES
    if size > most:
        return Refused(
            "InvalidSpec",
            f"spec: what it resolves to has {size // 1024} KiB, at most {most // 1024} KiB fit a Job; "
            "split the pipeline in two",
        )
    return Accepted(pipeline, record, is_new=True)


def permission_problems(snapshot: Snapshot, pipeline: AlignmentPipeline, stage: int | None) -> list[Problem]:
    """What the runtime as it is now does not allow of a stage (by index), or of the implicit steps (None)."""
    if snapshot.runtime is None:
        return []
    here = f"spec.stages[{stage}]"
    return [
        problem
        for problem in check_permissions(pipeline, snapshot.runtime)
        if not problem.path.startswith("spec.stages[") or problem.path.startswith(here)
    ]


def _kept(snapshot: Snapshot, pipeline: AlignmentPipeline) -> RunRecord | None:
    """The record before, where the edit only steers the run: neither an edited runtime nor an upgrade changes that run.

    A retry takes the runtime as it is now, because a broken runtime may be why it is asked for.
    """
    before = snapshot.previous
    if before is None or before.spec_digest is None or before.spec_digest != spec_digest(snapshot.body):
        return None
    changes: dict[str, object] = {
        "pipeline": before.pipeline.model_copy(update={"generation": pipeline.metadata.generation or 1})
    }
    retry, runtime = pipeline.spec.retry, snapshot.runtime
    is_asked = retry is not None and retry.nonce != snapshot.status.retry_nonce
    if is_asked and runtime is not None and runtime.metadata.name == before.runtime_name:
        changes["runtime"] = runtime.spec
        now = {(endpoint.name, endpoint.version): endpoint for endpoint in runtime.spec.reward_endpoints}
        if before.endpoints is not None:  # At another version they would be other work.
            changes["endpoints"] = [now.get((item.name, item.version), item) for item in before.endpoints]
    return before.model_copy(update=changes)


def _joined(problems: tuple[Problem, ...] | list[Problem]) -> str:
    return shorten("\n".join(str(problem) for problem in problems), 32768)
