"""What the operator hands to a trainer, and what the trainer hands back."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from plumbline_api.base import Contract
from plumbline_api.errors import InputError, problems_of
from plumbline_api.pipeline import Storage
from plumbline_api.record import CONTRACT_VERSION, PipelineIdentity, RunRecord
from plumbline_api.runtime import RewardEndpoint

STAGE_ENV = "PLUMBLINE_STAGE"
"""Environment variable that holds the StageRun as JSON."""
PROGRESS_URL_ENV = "PLUMBLINE_PROGRESS_URL"
"""URL to POST progress to; absent: nobody listens."""
PROGRESS_TOKEN_ENV = "PLUMBLINE_PROGRESS_TOKEN_FILE"  # noqa: S105
"""File with the bearer token for progress."""
PROGRESS_CA_ENV = "PLUMBLINE_PROGRESS_CA_FILE"
"""File with the certificate authority of the progress server."""
PROGRESS_FILE_ENV = "PLUMBLINE_PROGRESS_FILE"
"""File that takes the same report instead, replaced atomically; the local runner reads it."""
TERMINATION_LOG_ENV = "PLUMBLINE_TERMINATION_LOG"
"""File that rank 0 of node 0 writes the StageResult to; default /dev/termination-log."""
STAGES_AT_ONCE_ENV = "PLUMBLINE_STAGES_AT_ONCE"
"""How many trainers may share this machine's processors; absent: one has them all."""
ENDPOINT_TOKEN_PREFIX = "PLUMBLINE_ENDPOINT_TOKEN_"  # noqa: S105
"""Environment variables with the bearer tokens of reward endpoints, see `endpoint_token_env`."""
ENDPOINT_TOKEN_KEY = "token"  # noqa: S105
"""Key of an endpoint's Secret."""
RESULT_FILE_NAME = "result.json"
STAGE_RUN_MAX_BYTES = 96 * 1024
STAGE_RESULT_MAX_BYTES = 4096
METRICS_MAX = 20
"""Figures of a stage that travel, the first ones; its manifest holds all."""

EXIT_DONE = 0
EXIT_BAD_INPUT = 2
EXIT_TRANSIENT = 75
EXIT_STOPPED = 143


def endpoint_token_env(name: str) -> str:
    """The environment variable with the bearer token of a reward endpoint."""
    return ENDPOINT_TOKEN_PREFIX + name.upper().replace("-", "_")


Role = Literal["preflight", "stage", "collect", "finalize"]


class StageInput(Contract):
    """One input with everything that is needed to find and verify it."""

    role: str
    """Field that names it, such as `model`, `dataset`, `reference`, `baseline`, `suites.0.dataset`."""
    name: str
    """What people call it: the stage's or the dataset's name, or `base`."""
    kind: Literal["policy", "rewardModel", "dataset", "report", "classifier", "function", "endpoint"]
    """What it is."""
    stage_type: str | None = None
    """Type of the stage that wrote it; None for external inputs."""
    fingerprint: str | None = None
    """Fingerprint of the stage that wrote it; with the type it says where its manifest lies."""
    uri: str | None = None
    """Location of an external input."""
    digest: str | None = None
    """Pinned digest of an external input."""
    settings: dict[str, Any] = {}
    """How an external input is read."""


class StageOutcome(Contract):
    """How one stage ended; finalize reads them."""

    name: str
    """Name of the stage."""
    type: str
    """Stage type."""
    phase: str
    """Succeeded, Failed, Skipped, …"""
    fingerprint: str | None = None
    """Where its output and logs lie."""
    reason: str | None = None
    """Why it ended so."""
    message: str | None = None
    """In words."""
    cached: bool = False
    """Whether its output was found in storage."""
    attempts: int = 0
    """Attempts of this run."""
    seconds: float | None = None
    """Wall time of this run's attempts."""
    gpu_seconds: float | None = None
    """Accelerator time of this run's attempts."""


class StageRun(Contract):
    """One attempt at one stage. Everything the trainer needs; immutable with its Job."""

    contract_version: int = CONTRACT_VERSION
    """Version of this contract."""
    role: Role = "stage"
    """A declared stage, or one of the implicit steps."""
    pipeline: PipelineIdentity
    """Which run it belongs to."""
    stage: str
    """Name of the stage."""
    type: str
    """Stage type; for implicit steps the role."""
    attempt: Annotated[int, Field(ge=1)]
    """Number of the attempt."""
    fingerprint: str
    """Identity of the work."""
    numerics_version: int = 1
    """Numerics version that the fingerprint holds; a trainer that has another one refuses."""
    parameters: dict[str, Any] = {}
    """Effective parameters of the stage type."""
    inputs: list[StageInput] = []
    """What to read."""
    storage: Storage
    """Where to write: `<uri>/<namespace>/<type>/<fingerprint>`."""
    endpoints: list[RewardEndpoint] | None = None
    """Reward endpoints that the stage asks."""
    nodes: int = 1
    """Pods that work together."""
    processes_per_node: int = 1
    """Ranks per pod."""
    record: RunRecord | None = None
    """The run record; for preflight and finalize."""
    pins: list[str] = []
    """Digests of the external inputs in the record's order; for finalize."""
    outcomes: list[StageOutcome] = []
    """How the stages ended; for finalize."""

    def to_json(self) -> str:
        """The document for the environment variable."""
        return json.dumps(self.to_wire(), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> StageRun:
        """Parse the environment variable.

        Raises:
            InputError: if the document is not one this software understands.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{STAGE_ENV} is not JSON: {error}") from error
        version = document.get("contractVersion") if isinstance(document, dict) else None
        if version != CONTRACT_VERSION:
            raise InputError(
                f"this trainer speaks contract version {CONTRACT_VERSION}, the operator {version}; "
                "use the trainer image that belongs to the operator's release",
                reason="RuntimeTooOld",
            )
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise InputError("; ".join(str(p) for p in problems_of(error, cls))) from error


class PreflightFindings(Contract):
    """What preflight found, in the order of the record; compact, because it travels in a termination message."""

    digests: list[str]
    """SHA-256 of each external input, base64url without padding (43 characters each)."""
    cached: str
    """One character per stage: `1` where the output is in storage with the right parents, else `0`."""
    notes: list[Annotated[str, Field(max_length=160)]] = []
    """Short remarks for people, such as row counts and estimates."""


class StageResult(Contract):
    """How an attempt ended. The record is `result.json` in storage; the termination message carries the same."""

    contract_version: int = CONTRACT_VERSION
    """Version of this contract."""
    outcome: Literal["Succeeded", "Failed", "Stopped"]
    """Stopped: on SIGTERM, after a checkpoint."""
    reason: str
    """One word, such as Completed, BadInput, OutOfMemory, StorageDenied, InputMissing, InputChanged, Interrupted."""
    message: str = ""
    """What was seen and what to do."""
    manifest_digest: str | None = None
    """SHA-256 of the committed manifest."""
    metrics: dict[str, float] = {}
    """At most 20 figures."""
    tokens: int = 0
    """Tokens processed by this attempt."""
    gpu_seconds: float = 0.0
    """Accelerator seconds of this attempt."""
    first_step: int | None = None
    """Optimizer step that this attempt started from; above 0 after a resume."""
    last_step: int | None = None
    """Optimizer step that this attempt ended at."""
    reused: bool = False
    """Whether the output was already committed and nothing was computed."""
    preflight: PreflightFindings | None = None
    """Findings of preflight."""

    def to_message(self) -> str:
        """The termination message: under 4096 bytes, the message cut short if it must be."""
        text = _dump(self)
        if len(text.encode()) < STAGE_RESULT_MAX_BYTES:
            return text
        over = len(text.encode()) - STAGE_RESULT_MAX_BYTES + 64
        kept = self.message.encode()[: max(len(self.message.encode()) - over, 200)].decode(errors="ignore")
        text = _dump(self.model_copy(update={"message": kept + "…"}))
        if len(text.encode()) < STAGE_RESULT_MAX_BYTES:
            return text
        text = _dump(self.model_copy(update={"message": kept + "…", "metrics": {}, "preflight": self._without_notes()}))
        if len(text.encode()) >= STAGE_RESULT_MAX_BYTES:
            raise ValueError("the stage result does not fit a termination message")
        return text

    def _without_notes(self) -> PreflightFindings | None:
        return None if self.preflight is None else self.preflight.model_copy(update={"notes": []})

    @classmethod
    def from_message(cls, text: str) -> StageResult | None:
        """Parse a termination message; None where it holds no result."""
        try:
            return cls.model_validate_json(text)
        except ValueError:
            return None


def _dump(result: StageResult) -> str:
    return json.dumps(result.to_wire(), ensure_ascii=False, separators=(",", ":"))


class TrainerStatus(Contract):
    """Body of a progress report, after Kubeflow Trainer's protocol."""

    model_config = Contract.model_config | {"extra": "ignore"}

    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = None
    """Share of the work that is done."""
    estimated_remaining_seconds: Annotated[float, Field(ge=0)] | None = None
    """Seconds that are left."""
    metrics: Annotated[
        list[dict[Literal["name", "value"], Annotated[str, Field(max_length=128)]]], Field(max_length=20)
    ] = []
    """Latest figures."""
    message: Annotated[str, Field(max_length=256)] = ""
    """Such as `step 25/40`."""
    last_updated_time: str | None = None
    """When this was true."""


class ProgressReport(Contract):
    """A progress report."""

    model_config = Contract.model_config | {"extra": "ignore"}

    trainer_status: TrainerStatus
    """How far the stage has come."""
