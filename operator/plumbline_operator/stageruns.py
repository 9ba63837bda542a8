"""From the record to what one attempt is told: the StageRun of each role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from plumbline_api import layout
from plumbline_api.names import FINALIZE, PREFLIGHT, job_name
from plumbline_api.record import InputRef, RunRecord, StageRecord
from plumbline_api.stagerun import StageInput, StageOutcome, StageRun
from plumbline_api.stages import yields_of

from plumbline_operator.snapshot import CPU_ONLY, StartStage

OUTCOMES_RESERVED_BYTES = 36 * 1024
"""Room that outcomes and pins take in finalize's document beside the record."""


def preflight_run(record: RunRecord, *, fingerprint: str, attempt: int) -> StageRun:
    """What preflight is told."""
    return StageRun(
        role="preflight",
        pipeline=record.pipeline,
        stage=PREFLIGHT,
        type=PREFLIGHT,
        attempt=attempt,
        fingerprint=fingerprint,
        storage=record.storage,
        record=record,
    )


def finalize_run(
    record: RunRecord, *, fingerprint: str, pins: Sequence[str], outcomes: Sequence[StageOutcome], attempt: int
) -> StageRun:
    """What finalize is told."""
    return StageRun(
        role="finalize",
        pipeline=record.pipeline,
        stage=FINALIZE,
        type=FINALIZE,
        attempt=attempt,
        fingerprint=fingerprint,
        storage=record.storage,
        record=record,
        pins=list(pins),
        outcomes=list(outcomes),
    )


def stage_run(
    record: RunRecord,
    name: str,
    *,
    fingerprints: Mapping[str, str],
    pins: Sequence[str],
    attempt: int,
    role: Literal["stage", "collect"] = "stage",
) -> StageRun:
    """What a declared stage, or the reading back of its result, is told."""
    stage = record.stage(name)
    is_stage = role == "stage"
    return StageRun(
        role=role,
        pipeline=record.pipeline,
        stage=stage.name,
        type=stage.type,
        attempt=attempt,
        fingerprint=fingerprints[name],
        numerics_version=stage.numerics_version,
        parameters=stage.parameters,
        inputs=[_stage_input(record, ref, fingerprints, pins) for ref in stage.inputs],
        storage=record.storage,
        endpoints=record.endpoints_of(name) if is_stage else None,
        nodes=stage.resources.nodes if is_stage else 1,
        processes_per_node=max(stage.resources.gpus_per_node or 1, 1) if is_stage else 1,
    )


def _stage_input(record: RunRecord, ref: InputRef, fingerprints: Mapping[str, str], pins: Sequence[str]) -> StageInput:
    if ref.stage is not None:
        producer = record.stage(ref.stage)
        return StageInput(
            role=ref.role,
            name=producer.name,
            kind=yields_of(producer.type, producer.parameters).value,
            stage_type=producer.type,
            fingerprint=fingerprints[producer.name],
        )
    assert ref.external is not None
    external = record.external_inputs[ref.external]
    return StageInput(
        role=ref.role,
        name="base" if external.name == "model" else external.name.removeprefix("dataset/"),
        kind=external.kind,
        uri=external.uri,
        digest=pins[ref.external],
        settings=external.settings,
    )


def start(run: StageRun, record: RunRecord, *, implicit_timeout: int | None) -> StartStage:
    """The attempt as an action, with its job's name and what its pods ask for."""
    job = job_name(
        pipeline=run.pipeline.name,
        stage=run.stage,
        uid=run.pipeline.uid,
        fingerprint=run.fingerprint,
        attempt=run.attempt,
        role=run.role,
    )
    if run.role != "stage":
        return StartStage(run=run, job=job, resources=CPU_ONLY, timeout_seconds=implicit_timeout)
    stage = record.stage(run.stage)
    gpus = stage.resources.gpus_per_node or 0
    return StartStage(
        run=run,
        job=job,
        runtime_class=stage.runtime_class,
        resources=stage.resources.model_copy(update={"gpus_per_node": gpus}),
        timeout_seconds=stage.timeout_seconds,
    )


def output_uri(record: RunRecord, stage: StageRecord, fingerprint: str) -> str:
    """Where a stage's manifest lies."""
    return layout.stage_root(record.storage.uri, record.pipeline.namespace, stage.type, fingerprint)


def report_uri(record: RunRecord) -> str:
    """Where the report of a run lies."""
    root = layout.pipeline_root(
        record.storage.uri, record.pipeline.namespace, record.pipeline.name, record.pipeline.uid
    )
    return f"{root}/report.html"
