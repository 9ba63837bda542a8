"""What a runtime lets a pipeline use: its owners' word, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator

from plumbline_api.errors import Problem
from plumbline_api.pipeline import AlignmentPipeline, PipelineSpec
from plumbline_api.quantities import parse_quantity
from plumbline_api.rewarding import rewards_of
from plumbline_api.runtime import AlignmentRuntime
from plumbline_api.stages import STAGE_TYPES


def check_permissions(pipeline: AlignmentPipeline, runtime: AlignmentRuntime) -> list[Problem]:
    """What a runtime does not allow: namespaces, prefixes, secrets, claims and limits. Checked before each Job as well."""
    spec, offer, namespace = pipeline.spec, runtime.spec, pipeline.metadata.namespace or "default"
    allow, name = offer.allow, runtime.metadata.name
    problems: list[Problem] = []

    def refuse(path: str, value: str, what: str, allowed: list[str] | None) -> None:
        shown = ", ".join(item.replace("{namespace}", namespace) for item in allowed or []) or "none"
        problems.append(
            Problem(path, f'runtime {name} does not allow {what} "{value}" in namespace {namespace}. Allowed: {shown}')
        )

    if allow.namespaces is not None and namespace not in allow.namespaces:
        problems.append(
            Problem(
                "spec.runtimeRef",
                f"runtime {name} may not be used in namespace {namespace}; ask its owners to add it to allow.namespaces",
            )
        )
    sources = [("spec.model.source", spec.model.source)]
    for index, stage in enumerate(spec.stages):
        if stage.evaluate is not None:
            for number, suite in enumerate(stage.evaluate.suites):
                if suite.win_rate is not None and suite.win_rate.judge.model is not None:
                    path = f"spec.stages[{index}].evaluate.suites[{number}].winRate.judge.model.source"
                    sources.append((path, suite.win_rate.judge.model.source))
    sources += [(f"{path}.model", reward.model) for path, reward in rewards_of(spec) if reward.model is not None]
    for path, source in sources:
        if not runtime.allows(allow.model_sources, source, namespace):
            refuse(path, source, "the model source", allow.model_sources)
    for index, dataset in enumerate(spec.datasets):
        if not runtime.allows(allow.dataset_sources, dataset.source, namespace):
            refuse(f"spec.datasets[{index}].source", dataset.source, "the dataset source", allow.dataset_sources)
        sources.append((f"spec.datasets[{index}].source", dataset.source))
    for path, source in sources:
        if source.startswith("pvc://"):
            claim = source.removeprefix("pvc://").split("/")[0]
            if allow.claims is not None and claim not in allow.claims:
                refuse(path, claim, "the claim", allow.claims)
    if spec.storage is not None:
        if not runtime.allows(allow.storage_prefixes, spec.storage.uri, namespace):
            refuse("spec.storage.uri", spec.storage.uri, "the storage prefix", allow.storage_prefixes)
        if spec.storage.endpoint is not None and not runtime.allows(allow.endpoints, spec.storage.endpoint, namespace):
            refuse("spec.storage.endpoint", spec.storage.endpoint, "the endpoint", allow.endpoints)
        if (
            spec.storage.secret_name is not None
            and allow.secret_names is not None
            and spec.storage.secret_name not in allow.secret_names
        ):
            refuse("spec.storage.secretName", spec.storage.secret_name, "the secret", allow.secret_names)
    for path, reward in rewards_of(spec):
        if reward.function is not None and reward.function not in (allow.reward_functions or []):
            refuse(f"{path}.function", reward.function, "the reward function", allow.reward_functions)
        endpoints = [endpoint.name for endpoint in offer.reward_endpoints]
        if reward.endpoint is not None and reward.endpoint not in endpoints:
            refuse(f"{path}.endpoint", reward.endpoint, "the reward endpoint", endpoints)
    problems += _check_limits(spec, runtime)
    return problems


def _check_limits(spec: PipelineSpec, runtime: AlignmentRuntime) -> Iterator[Problem]:
    limits, name = runtime.spec.limits, runtime.metadata.name
    for index, stage in enumerate(spec.stages):
        asked, here = stage.resources, f"spec.stages[{index}].resources"
        pieces = runtime.spec.classes.of(STAGE_TYPES[stage.type].runtime_class)
        gpus = pieces.gpus_per_node if asked.gpus_per_node is None else asked.gpus_per_node
        if gpus and runtime.spec.accelerator is None:
            yield Problem(
                f"{here}.gpusPerNode",
                f"runtime {name} has no accelerator; leave the field out or choose another runtime",
            )
        for field, value, limit in (("nodes", asked.nodes, limits.nodes), ("gpusPerNode", gpus, limits.gpus_per_node)):
            if limit is not None and value > limit:
                yield Problem(f"{here}.{field}", f"{value} is over the limit {limit} of runtime {name}")
        for field, quantity, most in (("cpu", asked.cpu, limits.cpu), ("memory", asked.memory, limits.memory)):
            if quantity is not None and most is not None and parse_quantity(quantity) > parse_quantity(most):
                yield Problem(f"{here}.{field}", f"{quantity} is over the limit {most} of runtime {name}")
