"""Status of an AlignmentPipeline: what users and `kubectl wait` read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from plumbline_api.base import Contract

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
StagePhase = Literal["Pending", "Queued", "Running", "Suspended", "Succeeded", "Failed", "Skipped"]
PipelinePhase = Literal["Pending", "Preflight", "Running", "Suspended", "Succeeded", "Failed", "Refused"]


class Condition(Contract):
    """A metav1.Condition."""

    type: str
    """Accepted, Running, Suspended, Succeeded, Failed, Reported, Ready, Stalled or Reconciling."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds."""
    reason: Annotated[str, Field(max_length=1024)]
    """One word that says why."""
    message: Annotated[str, Field(max_length=32768)] = ""
    """What was seen and what to do."""
    observed_generation: int | None = None
    """Generation of the spec that the condition speaks of."""
    last_transition_time: Time
    """When the status last changed."""


class Metric(Contract):
    """One figure that a stage measured."""

    name: Annotated[str, Field(max_length=128)]
    """Name of the metric."""
    value: Annotated[str, Field(max_length=64)]
    """Value as a decimal number."""


class Progress(Contract):
    """How far a stage has come."""

    percentage: Annotated[int, Field(ge=0, le=100)]
    """Share of the work that is done."""
    message: Annotated[str, Field(max_length=256)] = ""
    """Such as `step 25/40`."""
    finish_time: Time | None = None
    """When the stage is expected to end."""
    last_update_time: Time
    """When the trainer last reported."""


class Output(Contract):
    """What a stage wrote."""

    uri: str
    """Folder in object storage that holds the stage's manifest."""
    digest: str | None = None
    """SHA-256 of the manifest; absent where the output was found in storage and nothing had to read it."""


class StageStatus(Contract):
    """State of one stage."""

    name: str
    """Name of the stage; preflight and finalize stand beside the declared ones."""
    type: str
    """Stage type."""
    phase: StagePhase = "Pending"
    """Where the stage stands."""
    reason: str | None = None
    """One word that says why."""
    message: Annotated[str, Field(max_length=4096)] | None = None
    """What was seen and what to do."""
    job: str | None = None
    """Name of the Job of the current attempt."""
    attempt: int = 0
    """Attempts started so far, for the current fingerprint."""
    failures: int = 0
    """Attempts that count against `retries`."""
    recoveries: int = 0
    """Times that a lost input of the stage was computed again."""
    start_time: Time | None = None
    """When the first attempt started."""
    completion_time: Time | None = None
    """When the stage ended."""
    progress: Progress | None = None
    """How far a running stage has come."""
    metrics: Annotated[list[Metric], Field(max_length=20)] = []
    """Latest figures."""
    fingerprint: str | None = None
    """Identity of the stage's work: type, effective parameters, inputs and numerics version."""
    output: Output | None = None
    """What the stage wrote."""
    gpu_seconds: float | None = None
    """Accelerator time over all attempts."""
    cached: bool = False
    """Whether the output was found in storage."""


class InputPin(Contract):
    """An external input as preflight found it."""

    name: str
    """Name of the input, such as `model` or `dataset/prefs`."""
    digest: str
    """Digest of its content."""


class Usage(Contract):
    """What the run has used."""

    gpu_hours: float = 0.0
    """Accelerator hours over all stages and attempts."""
    former_gpu_seconds: float | None = None
    """The part of it that belongs to stages that are no longer in the spec."""


class ModelOutput(Contract):
    """The last policy that a succeeded stage yielded."""

    stage: str
    """Stage that wrote it."""
    uri: str
    """Folder in object storage that holds its manifest."""
    digest: str | None = None
    """SHA-256 of the manifest; absent where the output was found in storage and nothing had to read it."""


class PipelineStatus(Contract):
    """What has happened."""

    model_config = Contract.model_config | {"extra": "ignore"}

    observed_generation: int | None = None
    """Generation of the spec that this status speaks of."""
    phase: PipelinePhase = "Pending"
    """A word for people; programs read conditions."""
    stage: str | None = None
    """The stage that runs, and how many have ended, such as `dpo (2/4)`."""
    progress: str | None = None
    """Share of the running stage that is done."""
    eta: Time | None = None
    """When the running stages are expected to end."""
    record: str | None = None
    """ControllerRevision that holds the run record of this generation."""
    runtime: str | None = None
    """Runtime in use."""
    inputs: list[InputPin] = []
    """External inputs as pinned by preflight, in the record's order."""
    stages: Annotated[list[StageStatus], Field(json_schema_extra={"x-plumbline-map-key": "name"})] = []
    """State of every stage."""
    conditions: Annotated[list[Condition], Field(json_schema_extra={"x-plumbline-map-key": "type"})] = []
    """Accepted, Running, Suspended, Succeeded, Failed, Reported, Ready, Stalled, Reconciling."""
    usage: Usage = Usage()
    """What the run has used."""
    model: ModelOutput | None = None
    """The last policy that a succeeded stage yielded."""
    report: str | None = None
    """Where the report lies in object storage."""
    retry_nonce: str | None = None
    """Nonce of the last `spec.retry` that was acted on."""
    start_time: Time | None = None
    """When the run was accepted."""
    completion_time: Time | None = None
    """When the run ended."""

    def condition(self, type_: str) -> Condition | None:
        """The condition of a type."""
        return next((c for c in self.conditions if c.type == type_), None)

    def stage_named(self, name: str) -> StageStatus | None:
        """The state of a stage."""
        return next((s for s in self.stages if s.name == name), None)
