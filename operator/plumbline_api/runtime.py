"""AlignmentRuntime: what a platform team owns and offers to tenants."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from plumbline_api.base import GROUP_VERSION, Contract, Duration, Name, Quantity
from plumbline_api.jsontypes import parse_strictly
from plumbline_api.online import FunctionName
from plumbline_api.pipeline import ObjectName, Storage
from plumbline_api.stages import RuntimeClass

Prefix = Annotated[str, Field(min_length=1, max_length=1024)]


class Accelerator(Contract):
    """The accelerator of the runtime's nodes."""

    resource_name: Annotated[str, Field(min_length=1, max_length=253)] = "nvidia.com/gpu"
    """Extended resource that pods request."""
    memory: Quantity | None = None
    """Memory of one accelerator; preflight estimates against it."""
    tokens_per_second_hint: Annotated[float, Field(gt=0)] | None = None
    """Training tokens per second and accelerator for a 1B-parameter model; preflight scales it for time estimates."""


class Toleration(Contract):
    """A pod toleration."""

    key: Annotated[str, Field(max_length=317)] | None = None
    """Taint key."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How value is compared."""
    value: Annotated[str, Field(max_length=63)] | None = None
    """Taint value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect."""
    toleration_seconds: int | None = None
    """How long a NoExecute taint is tolerated."""


class EnvVar(Contract):
    """A plain environment variable; secrets come from the tenant's namespace only."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]
    """Name of the variable."""
    value: Annotated[str, Field(max_length=4096)]
    """Value of the variable."""


class PodClass(Contract):
    """Pieces of the pods of one class of stages."""

    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 0
    """Accelerators per pod where a stage does not say."""
    cpu: Quantity = "1"
    """CPU request per pod where a stage does not say."""
    memory: Quantity = "4Gi"
    """Memory request and limit per pod where a stage does not say."""
    ephemeral_storage: Quantity = "50Gi"
    """Disk that a pod may fill: the scratch volume on /tmp, and its log. It asks for at most 2Gi of it."""
    shared_memory: Quantity | None = None
    """Size of /dev/shm. Absent: the container engine's."""
    node_selector: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=16)] = {}
    """Labels that nodes must have."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = []
    """Taints that pods tolerate."""
    priority_class_name: ObjectName | None = None
    """Priority class of the pods."""
    runtime_class_name: ObjectName | None = None
    """Container runtime class of the pods."""
    env: Annotated[list[EnvVar], Field(max_length=64)] = []
    """Environment of the trainer."""


class PodClasses(Contract):
    """Pod pieces by class of stage."""

    train: PodClass = PodClass(cpu="4", memory="16Gi")
    """Stages that train."""
    generate: PodClass = PodClass(cpu="4", memory="16Gi")
    """Stages that sample and score."""
    cpu: PodClass = PodClass()
    """Preflight, merge, finalize and other stages without an accelerator."""

    def of(self, name: RuntimeClass) -> PodClass:
        """The pieces of a class."""
        found: PodClass = getattr(self, name)
        return found


class Allow(Contract):
    """What tenants may name. A list left out allows everything of its kind; `{namespace}` stands for the tenant's."""

    namespaces: Annotated[list[Annotated[str, Field(max_length=63)]], Field(max_length=1024)] | None = None
    """Namespaces that may use the runtime."""
    model_sources: Annotated[list[Prefix], Field(max_length=64)] | None = None
    """Prefixes of model and judge URIs."""
    dataset_sources: Annotated[list[Prefix], Field(max_length=64)] | None = None
    """Prefixes of dataset URIs."""
    storage_prefixes: Annotated[list[Prefix], Field(max_length=64)] | None = None
    """Prefixes of storage URIs."""
    endpoints: Annotated[list[Prefix], Field(max_length=64)] | None = None
    """S3 endpoints."""
    secret_names: Annotated[list[ObjectName], Field(max_length=64)] | None = None
    """Secrets that a pipeline's storage may name."""
    claims: Annotated[list[ObjectName], Field(max_length=64)] | None = None
    """PersistentVolumeClaims that a pvc:// source may name."""
    reward_functions: Annotated[list[FunctionName], Field(max_length=64)] | None = None
    """Python functions of the trainer image that rewards may call, package.module:function. Absent: none."""


class RewardEndpoint(Contract):
    """An HTTP service that scores answers: POST {prompts, answers, references} gives {scores}."""

    name: Name
    """Name by which rewards refer to it."""
    url: Annotated[str, Field(pattern=r"^https?://", max_length=1024)]
    """Where requests are posted."""
    version: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Changes whenever equal answers would get other scores. Absent: outputs that it scored are not reused by other pipelines."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 32
    """Answers per request."""
    timeout: Duration = "1m"
    """Longest time of one request."""
    secret_name: ObjectName | None = None
    """Secret in each tenant's namespace with a key `token`, sent as a bearer token."""


class Limits(Contract):
    """The most that one stage may ask for."""

    nodes: Annotated[int, Field(ge=1)] | None = None
    """Nodes per stage."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """Accelerators per node."""
    cpu: Quantity | None = None
    """CPU per pod."""
    memory: Quantity | None = None
    """Memory per pod."""


class Proxy(Contract):
    """HTTP proxy of trainer pods."""

    http_proxy: Annotated[str, Field(max_length=512)] | None = None
    """Proxy for http URLs."""
    https_proxy: Annotated[str, Field(max_length=512)] | None = None
    """Proxy for https URLs."""
    no_proxy: Annotated[str, Field(max_length=4096)] | None = None
    """Hosts that are reached directly."""


class RuntimeSpec(Contract):
    """What the runtime offers."""

    image: Annotated[str, Field(min_length=1, max_length=512)]
    """Trainer image, best by digest."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the image is pulled."""
    image_pull_secrets: Annotated[list[ObjectName], Field(max_length=16)] = []
    """Pull secrets expected in each tenant's namespace."""
    accelerator: Accelerator | None = None
    """Accelerator of the nodes. Absent: stages run on CPU."""
    classes: PodClasses = PodClasses()
    """Pod pieces by class of stage."""
    storage: Storage | None = None
    """Storage of pipelines that name none; the secret is expected in each tenant's namespace."""
    service_account_name: ObjectName | None = None
    """ServiceAccount expected in each tenant's namespace, for workload identity. Absent: `default`."""
    queue_name: ObjectName | None = None
    """Kueue LocalQueue that stage Jobs are submitted to."""
    reward_endpoints: Annotated[
        list[RewardEndpoint], Field(max_length=32), Field(json_schema_extra={"x-plumbline-map-key": "name"})
    ] = []
    """HTTP services that rewards may name."""
    allow: Allow = Allow()
    """What tenants may name."""
    limits: Limits = Limits()
    """The most that one stage may ask for."""
    ca_bundle_config_map: ObjectName | None = None
    """ConfigMap in each tenant's namespace with a key ca.crt that trainer pods trust."""
    proxy: Proxy | None = None
    """HTTP proxy of trainer pods."""
    hub_endpoint: Annotated[str, Field(pattern=r"^https?://", max_length=512)] | None = None
    """Mirror of the model hub."""
    job_ttl: Duration = "24h"
    """How long finished Jobs are kept."""
    termination_grace_period: Duration = "2m"
    """Time a trainer has to write a checkpoint after SIGTERM."""


class RuntimeMetadata(Contract):
    """The part of the object's metadata that is read here."""

    model_config = Contract.model_config | {"extra": "ignore"}

    name: ObjectName
    """Name of the runtime."""
    annotations: dict[str, str] = {}
    """Annotations; plumbline.dev/is-default-runtime marks the default."""


class AlignmentRuntime(Contract):
    """A runtime that a platform team offers: image, pod pieces, accelerator, storage, limits and permissions."""

    api_version: Literal["plumbline.dev/v1alpha1"] = GROUP_VERSION  # type: ignore[assignment]
    """API version."""
    kind: Literal["AlignmentRuntime"] = "AlignmentRuntime"
    """Kind."""
    metadata: RuntimeMetadata
    """Object metadata."""
    spec: RuntimeSpec
    """What the runtime offers."""

    @classmethod
    def parse(cls, body: dict[str, Any]) -> AlignmentRuntime:
        """Parse a manifest or an object of the API server.

        Raises:
            ManifestError: with every problem found.
        """
        return parse_strictly({k: v for k, v in body.items() if k != "status"}, cls)

    def allows(self, prefixes: list[str] | None, value: str, namespace: str) -> bool:
        """Whether a URI lies under one of the prefixes; a prefix ends at a path boundary."""
        if prefixes is None:
            return True
        for prefix in prefixes:
            allowed = prefix.replace("{namespace}", namespace)
            if value == allowed or value.startswith(allowed if allowed.endswith("/") else allowed + "/"):
                return "/../" not in value + "/"
        return False
