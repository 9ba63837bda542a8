"""The run record: everything a run resolved when it was accepted. Fingerprints, Jobs and reports derive from it only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from plumbline_api.base import Contract
from plumbline_api.evaluation import Gate
from plumbline_api.fingerprint import digest_of, without_names
from plumbline_api.pipeline import Storage
from plumbline_api.runtime import RewardEndpoint, RuntimeSpec
from plumbline_api.stages import Resources, RuntimeClass

CONTRACT_VERSION = 1
"""Version of StageRun, StageResult and the storage layout; a trainer refuses one it does not know."""


class ExternalInput(Contract):
    """Something from outside the pipeline that stages read. Its digest is pinned by preflight."""

    name: str
    """`model`, `dataset/<name>`, `judge/<stage>/<suite index>`, `reward/<stage>/<index>`, `function/…`, `endpoint/<name>`."""
    kind: Literal["policy", "dataset", "classifier", "function", "endpoint"]
    """What it is: a language model, rows, or what scores answers: a sequence classifier, Python source, a service."""
    uri: str
    """Where it lies."""
    settings: dict[str, Any] = {}
    """How it is read (format, columns, split, …); part of the fingerprint of every stage that reads it."""


class InputRef(Contract):
    """One input of a stage: the output of another stage or an external input."""

    role: str
    """Field that names it, such as `model`, `dataset`, `reference`, `suites.0.dataset`."""
    stage: str | None = None
    """Stage whose output it is."""
    external: int | None = None
    """Index into the record's external inputs."""


BESIDE_PARAMETERS = frozenset({"seed", "abortWhen"})
"""What stands among a stage's effective parameters and is no field of its type."""


def own_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a stage's type among its effective parameters."""
    return {name: value for name, value in parameters.items() if name not in BESIDE_PARAMETERS}


class StageRecord(Contract):
    """A stage with every default filled in."""

    name: str
    """Name of the stage."""
    type: str
    """Stage type."""
    numerics_version: int
    """Numerics version of the type when the record was made."""
    runtime_class: RuntimeClass
    """Class of its pods."""
    parameters: dict[str, Any]
    """Effective parameters, with seed, precision and learning rate resolved."""
    inputs: list[InputRef]
    """What the stage reads, the policy first."""
    depends_on: list[str]
    """Stages that must have succeeded first: those it reads and those of `after`."""
    resources: Resources
    """What it asks of the cluster."""
    gates: list[Gate] = []
    """Conditions on its metrics."""
    retries: int = 2
    """Further attempts after a transient failure."""
    timeout_seconds: int | None = None
    """Longest time of one attempt."""
    cache: bool = True
    """Whether an output found in storage is taken."""


class PipelineIdentity(Contract):
    """Which run this is."""

    name: str
    """Name of the pipeline."""
    namespace: str
    """Namespace of the pipeline."""
    uid: str
    """Identity of the pipeline object."""
    generation: int
    """Generation of the spec."""


class RunRecord(Contract):
    """What a run resolved when it was accepted."""

    contract_version: int = CONTRACT_VERSION
    """Version of the contract between operator and trainer."""
    operator_version: str
    """Version of the software that made the record."""
    pipeline: PipelineIdentity
    """Which run this is."""
    spec_digest: str | None = None
    """Digest of the spec without `suspend`, `retry` and `ttlAfterFinished`: equal means that nothing else was edited."""
    seed: int
    """Seed of every random choice."""
    storage: Storage
    """Where results go."""
    runtime_name: str | None = None
    """Runtime in use; None for local runs."""
    runtime: RuntimeSpec | None = None
    """The runtime as it was then."""
    endpoints: list[RewardEndpoint] | None = None
    """Reward endpoints that the stages name."""
    external_inputs: list[ExternalInput]
    """Inputs from outside, the model first."""
    stages: list[StageRecord]
    """Stages in declared order."""

    def stage(self, name: str) -> StageRecord:
        """The stage of a name."""
        return next(stage for stage in self.stages if stage.name == name)

    def endpoints_of(self, name: str) -> list[RewardEndpoint] | None:
        """The reward endpoints that a stage asks."""
        asked = {item.get("endpoint") for item in self.stage(name).parameters.get("rewards") or []}
        return [item for item in self.endpoints or [] if item.name in asked] or None

    def digest(self) -> str:
        """Identity of the record."""
        return digest_of(self.to_wire())


def fingerprints(record: RunRecord, digests: list[str]) -> dict[str, str]:
    """The fingerprint of every stage, given the digests of the external inputs in the record's order.

    A fingerprint is the SHA-256 of the canonical JSON of stage type, numerics version, effective parameters and
    inputs; a stage input enters by its fingerprint, an external one by its digest and how it is read.
    """
    found: dict[str, str] = {}

    def of(name: str) -> str:
        if name in found:
            return found[name]
        stage = record.stage(name)
        inputs: list[Any] = []
        for ref in stage.inputs:
            if ref.stage is not None:
                inputs.append([ref.role, {"stage": of(ref.stage)}])
            else:
                assert ref.external is not None
                external = record.external_inputs[ref.external]
                inputs.append([ref.role, {"digest": digests[ref.external], "settings": external.settings}])
        identity: dict[str, Any] = {
            "type": stage.type,
            "numerics": stage.numerics_version,
            "parameters": without_names(stage.parameters),
            "inputs": inputs,
        }
        if not stage.cache:
            identity["run"] = record.pipeline.uid
        found[name] = digest_of(identity)
        return found[name]

    for stage in record.stages:
        of(stage.name)
    return found
