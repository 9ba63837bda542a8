"""From a checked manifest to the run record: every default filled in, every reference resolved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plumbline_api.artifacts import ArtifactKind
from plumbline_api.base import EXTERNAL_INPUTS_MAX
from plumbline_api.check import Place, check
from plumbline_api.errors import ManifestError, Problem
from plumbline_api.evaluation import Gate
from plumbline_api.graph import BASE_MODEL, dependencies, references
from plumbline_api.methods import DEFAULT_LEARNING_RATES
from plumbline_api.online import ABORTED, FUNCTION_SCHEME, Ppo, Reward
from plumbline_api.pipeline import AlignmentPipeline, Dataset, Storage
from plumbline_api.quantities import parse_duration
from plumbline_api.record import ExternalInput, InputRef, PipelineIdentity, RunRecord, StageRecord
from plumbline_api.runtime import AlignmentRuntime, RewardEndpoint
from plumbline_api.stages import MERGE_DEFAULTS, STAGE_TYPES, Stage
from plumbline_api.training import TOKENS_ON_ACCELERATOR, TOKENS_ON_CPU


def resolve(
    pipeline: AlignmentPipeline,
    runtime: AlignmentRuntime | None,
    *,
    operator_version: str,
    place: Place,
    local_storage: Storage | None = None,
    local_endpoints: Sequence[RewardEndpoint] = (),
) -> RunRecord:
    """Check a pipeline and freeze what it resolves to.

    Raises:
        ManifestError: if the check finds problems; they are all in it.
    """
    problems = check(pipeline, runtime, place=place, local_endpoints=local_endpoints)
    if problems:
        raise ManifestError(problems)
    spec = pipeline.spec
    if place == "local":
        assert local_storage is not None
        storage = local_storage
    else:
        found = spec.storage or (runtime.spec.storage if runtime is not None else None)
        if found is None:
            raise ManifestError([Problem("spec.storage", "no storage is set, neither here nor in the runtime")])
        storage = found
    offered = local_endpoints if runtime is None else runtime.spec.reward_endpoints
    external = _External(pipeline, {endpoint.name: endpoint for endpoint in offered})
    stages = [_resolve_stage(pipeline, runtime, index, external) for index in range(len(spec.stages))]
    if len(external.inputs) > EXTERNAL_INPUTS_MAX:
        raise ManifestError(
            [Problem("spec", f"{len(external.inputs)} external inputs; at most {EXTERNAL_INPUTS_MAX} are allowed")]
        )
    return RunRecord(
        operator_version=operator_version,
        pipeline=PipelineIdentity(
            name=pipeline.metadata.name,
            namespace=pipeline.metadata.namespace or "default",
            uid=pipeline.metadata.uid or "",
            generation=pipeline.metadata.generation or 1,
        ),
        seed=spec.seed,
        storage=storage,
        runtime_name=runtime.metadata.name if runtime is not None else None,
        runtime=runtime.spec if runtime is not None else None,
        endpoints=external.asked or None,
        external_inputs=external.inputs,
        stages=stages,
    )


class _External:
    """Collects external inputs, each once."""

    def __init__(self, pipeline: AlignmentPipeline, endpoints: Mapping[str, RewardEndpoint]) -> None:
        model = pipeline.spec.model
        self.inputs = [
            ExternalInput(name="model", kind="policy", uri=model.source, settings={"storageDtype": model.storage_dtype})
        ]
        self._datasets = {dataset.name: dataset for dataset in pipeline.spec.datasets}
        self._endpoints = endpoints
        self.asked: list[RewardEndpoint] = []

    def dataset(self, name: str) -> int:
        return self._add(_external_dataset(self._datasets[name]))

    def model(self, name: str, uri: str) -> int:
        return self._add(ExternalInput(name=name, kind="policy", uri=uri))

    def reward(self, stage: str, index: int, reward: Reward) -> InputRef | None:
        """What a reward reads from outside the pipeline, if anything."""
        role = f"rewards.{index}.{reward.choice}"
        if reward.model is not None:
            item = ExternalInput(name=f"reward/{stage}/{index}", kind="classifier", uri=reward.model)
        elif reward.function is not None:
            item = ExternalInput(
                name=f"function/{reward.function}", kind="function", uri=f"{FUNCTION_SCHEME}{reward.function}"
            )
        elif reward.endpoint is not None:
            endpoint = self._endpoints[reward.endpoint]
            if endpoint not in self.asked:
                self.asked.append(endpoint)
            settings = {} if endpoint.version is None else {"version": endpoint.version}
            item = ExternalInput(name=f"endpoint/{endpoint.name}", kind="endpoint", uri=endpoint.url, settings=settings)
        else:
            return None
        return InputRef(role=role, external=self._add(item))

    def is_versioned(self, reward: Reward) -> bool:
        """Whether equal inputs are known to give equal scores."""
        return reward.endpoint is None or self._endpoints[reward.endpoint].version is not None

    def _add(self, item: ExternalInput) -> int:
        for index, known in enumerate(self.inputs):
            if known.name == item.name:
                return index
        self.inputs.append(item)
        return len(self.inputs) - 1


def _external_dataset(dataset: Dataset) -> ExternalInput:
    wire = dataset.to_wire()
    settings = {key: wire[key] for key in ("format", "columns", "split", "role", "maxBadRows", "limit") if key in wire}
    return ExternalInput(name=f"dataset/{dataset.name}", kind="dataset", uri=dataset.source, settings=settings)


def _resolve_stage(
    pipeline: AlignmentPipeline, runtime: AlignmentRuntime | None, index: int, external: _External
) -> StageRecord:
    spec = pipeline.spec
    stage = spec.stages[index]
    kind = STAGE_TYPES[stage.type]
    inputs: list[InputRef] = []
    for ref in references(spec, index):
        if ref.kind is ArtifactKind.DATASET:
            inputs.append(InputRef(role=ref.role, external=external.dataset(ref.target)))
        elif ref.target == BASE_MODEL:
            inputs.append(InputRef(role=ref.role, external=0))
        else:
            inputs.append(InputRef(role=ref.role, stage=ref.target))
    if stage.evaluate is not None:
        for number, suite in enumerate(stage.evaluate.suites):
            if suite.win_rate is not None and suite.win_rate.judge.model is not None:
                position = external.model(f"judge/{stage.name}/{number}", suite.win_rate.judge.model.source)
                inputs.append(InputRef(role=f"suites.{number}.judge", external=position))
    rewards = getattr(stage.value, "rewards", None) or []
    for number, reward in enumerate(rewards):
        if (read := external.reward(stage.name, number, reward)) is not None:
            inputs.append(read)
    resources = stage.resources
    if runtime is not None and resources.gpus_per_node is None:
        resources = resources.model_copy(
            update={"gpus_per_node": runtime.spec.classes.of(kind.runtime_class).gpus_per_node}
        )
    return StageRecord(
        name=stage.name,
        type=stage.type,
        numerics_version=kind.numerics_version,
        runtime_class=kind.runtime_class,
        parameters=_effective_parameters(stage, seed=spec.seed, accelerated=bool(resources.gpus_per_node)),
        inputs=inputs,
        depends_on=dependencies(spec, index),
        resources=resources,
        gates=[*stage.gates, *_abort_gate(stage)],
        retries=stage.retries,
        timeout_seconds=None if stage.timeout is None else round(parse_duration(stage.timeout)),
        cache=stage.cache and all(external.is_versioned(reward) for reward in rewards),
    )


def _abort_gate(stage: Stage) -> list[Gate]:
    """A stage that was aborted yields its last good weights all the same; whether they are let through is a gate.

    With onAbort continue the gate always holds, but it has an output that is found in storage read, so that status says
    that it was aborted.
    """
    if not stage.abort_when:
        return []
    return [Gate(metric=ABORTED, at_most=1.0 if stage.on_abort == "continue" else 0.0)]


def _effective_parameters(stage: Stage, *, seed: int, accelerated: bool) -> dict[str, Any]:
    """The stage's parameters with what is left to defaults resolved; parsed again by the same model."""
    parameters: dict[str, Any] = stage.value.to_wire()
    parameters["seed"] = seed
    if stage.abort_when:
        parameters["abortWhen"] = [rule.to_wire() for rule in stage.abort_when]
    precision = "bfloat16" if accelerated else "float32"
    if "training" in parameters:
        training = parameters["training"]
        with_lora, full = DEFAULT_LEARNING_RATES[stage.type]
        training.setdefault("learningRate", with_lora if "lora" in parameters else full)
        training.setdefault("tokensPerBatch", TOKENS_ON_ACCELERATOR if accelerated else TOKENS_ON_CPU)
        if training["precision"] == "auto":
            training["precision"] = precision
    if isinstance(stage.value, Ppo):
        parameters["critic"].setdefault("learningRate", parameters["training"]["learningRate"])
    if parameters.get("precision") == "auto":
        parameters["precision"] = precision
    if stage.merge is not None and stage.merge.method is not None:
        parameters = MERGE_DEFAULTS[stage.merge.method] | parameters
    if "lora" in parameters:
        parameters["lora"].setdefault("alpha", 2.0 * parameters["lora"]["rank"])
    return parameters
