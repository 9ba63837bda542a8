"""AlignmentPipeline: what a tenant writes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from plumbline_api.artifacts import DatasetFormat
from plumbline_api.base import (
    EXTERNAL_INPUTS_MAX,
    GROUP_VERSION,
    LABEL_PATTERN,
    NAME_PATTERN,
    PIPELINE_NAME_MAX,
    STAGES_MAX,
    Contract,
    Duration,
    Name,
    Uri,
    one_of_rule,
)
from plumbline_api.errors import ManifestError, Problem
from plumbline_api.jsontypes import parse_strictly
from plumbline_api.stages import Stage
from plumbline_api.status import PipelineStatus

ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]


class RuntimeRef(Contract):
    """Reference to a runtime."""

    name: ObjectName
    """Name of an AlignmentRuntime."""


class ModelSource(Contract):
    """The model to start from."""

    source: Uri
    """Where the weights lie: hf://org/name@revision, s3://bucket/path, pvc://claim/path, bundled://smollm2-135m-instruct, or file:///path (local runs only). Safetensors with config and tokenizer."""
    storage_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which weights and every merged delta are stored. auto: the type of the source (float32 for bundled GGUF models)."""


class Storage(Contract):
    """Where checkpoints, results and reports go."""

    uri: Uri
    """Root in object storage, s3://bucket/prefix; file:///path for local runs."""
    endpoint: Annotated[str, Field(pattern=r"^https?://", max_length=512)] | None = None
    """S3 endpoint. Absent: that of the AWS region."""
    region: Annotated[str, Field(max_length=64)] | None = None
    """S3 region."""
    secret_name: ObjectName | None = None
    """Secret in the pipeline's namespace with keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN). Absent: workload identity."""


class DatasetSplit(Contract):
    """Shares of the rows that are held out, chosen by a hash of the normalised prompt."""

    evaluation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share for early stopping and selection."""
    test: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share for gates and the report."""

    def model_post_init(self, _context: Any) -> None:
        """Something must be left to train on or to measure."""
        if self.evaluation + self.test > 1:
            raise ValueError("evaluation + test must not exceed 1")


class Dataset(Contract):
    """A named set of rows."""

    name: Name
    """Name by which stages refer to it."""
    source: Uri
    """Where the rows lie: s3://bucket/path/*.jsonl, hf://datasets/org/name@revision, pvc://claim/path, file:///path or a path relative to the manifest (local runs only). JSONL, JSON, Parquet, CSV or text, by suffix."""
    format: DatasetFormat = "auto"
    """How rows are written. auto: found by preflight."""
    columns: Annotated[dict[str, Annotated[str, Field(max_length=128)]], Field(max_length=16)] = {}
    """Column names of the source for field names of the format, such as `prompt: question`, where they differ."""
    split: DatasetSplit = DatasetSplit()
    """Held-out shares."""
    role: Literal["train", "test"] = "train"
    """test: every row is held out, and no training stage may read the dataset."""
    max_bad_rows: Annotated[int, Field(ge=0)] = 0
    """Rows of the wrong shape that are skipped (and counted) before the run is refused."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Read only the first so many rows."""


class Retry(Contract):
    """A request to try a failed stage again."""

    stage: Name | None = None
    """Stage to retry from. Absent: every failed stage."""
    nonce: Annotated[str, Field(min_length=1, max_length=64)]
    """Any text that differs from the last request."""


class PipelineSpec(Contract):
    """What to run."""

    runtime_ref: RuntimeRef | None = None
    """Runtime that offers images, accelerators and storage. Absent: the default runtime."""
    model: ModelSource
    """The model to start from."""
    storage: Storage | None = None
    """Where results go. Absent: the runtime's storage."""
    datasets: Annotated[
        list[Dataset], Field(max_length=EXTERNAL_INPUTS_MAX), Field(json_schema_extra={"x-plumbline-map-key": "name"})
    ] = []
    """Data of the pipeline."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Seed of every random choice."""
    stages: Annotated[
        list[Stage],
        Field(min_length=1, max_length=STAGES_MAX),
        Field(
            json_schema_extra={
                "x-plumbline-map-key": "name",
                "x-plumbline-item-validations": [one_of_rule(Stage)],
            }
        ),
    ]
    """The stages; they run in parallel where their references allow."""
    suspend: bool = False
    """Stop running stages after a checkpoint and start no others, until set to false again."""
    retry: Retry | None = None
    """Try failed stages again."""
    ttl_after_finished: Duration | None = None
    """Delete the pipeline object so long after it ended; what lies in storage stays."""


class PipelineMetadata(Contract):
    """The part of the object's metadata that is checked here."""

    model_config = Contract.model_config | {"extra": "ignore"}

    name: Annotated[str, Field(pattern=NAME_PATTERN, max_length=PIPELINE_NAME_MAX)]
    """Name of the pipeline."""
    namespace: Annotated[str, Field(pattern=LABEL_PATTERN, max_length=63)] | None = None
    """Namespace of the pipeline."""
    uid: str | None = None
    """Identity given by the API server."""
    generation: int | None = None
    """Counts changes of the spec."""


class AlignmentPipeline(Contract):
    """A run of stages that turns a base model into an aligned one."""

    api_version: Literal["plumbline.dev/v1alpha1"] = GROUP_VERSION  # type: ignore[assignment]
    """API version."""
    kind: Literal["AlignmentPipeline"] = "AlignmentPipeline"
    """Kind."""
    metadata: PipelineMetadata
    """Object metadata."""
    spec: PipelineSpec
    """What to run."""
    status: PipelineStatus | None = None
    """What has happened."""

    @classmethod
    def parse(cls, body: dict[str, Any]) -> AlignmentPipeline:
        """Parse a manifest or an object of the API server.

        Raises:
            ManifestError: with every problem found, each with its field path and remedy.
        """
        if not isinstance(body, dict):
            raise ManifestError([Problem("", f"a manifest is a mapping, this is {type(body).__name__}")])
        given = {key: value for key, value in body.items() if key != "status"}
        name = (given.get("metadata") or {}).get("name") if isinstance(given.get("metadata"), dict) else None
        if isinstance(name, str) and len(name) > PIPELINE_NAME_MAX:
            raise ManifestError(
                [
                    Problem(
                        "metadata.name", f'"{name}" has {len(name)} characters; at most {PIPELINE_NAME_MAX} are allowed'
                    )
                ]
            )
        return parse_strictly(given, cls)
