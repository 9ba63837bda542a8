"""The graph of a pipeline: which stage reads what. Pure functions of the manifest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from plumbline_api.artifacts import PREFERENCE_FORMATS, ArtifactKind
from plumbline_api.methods import KlStage, PolicyStage
from plumbline_api.online import SampledStage
from plumbline_api.pipeline import PipelineSpec
from plumbline_api.stages import (
    BASED_METHODS,
    REHEARSAL_FORMATS,
    STAGE_TYPES,
    SUITE_FORMATS,
    Merge,
    Stage,
    yields_of,
)

BASE_MODEL = ""
"""Stands for spec.model where a stage starts from no other stage."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A name that a stage uses for an input."""

    role: str
    """`model`, `models.N`, `base`, `reference`, `kl.reference`, `baseline`, `dataset`, `prompts`, `rewards.N.stage`, `critic.start`, `sycophancy.dataset`, `rehearsal.N.dataset`, `ewc.dataset`, `suites.N.dataset` or `suites.N.judge`."""
    field: str
    """Path of the field below `spec.`."""
    target: str
    """Name of a stage or dataset; `BASE_MODEL` for spec.model."""
    kind: ArtifactKind
    """What the target must yield."""
    formats: frozenset[str] = frozenset()
    """Dataset formats that fit."""
    split: str | None = None
    """Part of the dataset that is read; None where the stage reads its training part."""
    implied: bool = False
    """Whether the manifest leaves the field out."""


def yields(stage: Stage) -> ArtifactKind:
    """What a stage yields."""
    return yields_of(stage.type, stage.value.to_wire())


def start_of(spec: PipelineSpec, index: int) -> str:
    """The stage whose policy stage `index` starts from, or `BASE_MODEL`."""
    stage = spec.stages[index]
    if stage.model is not None:
        return stage.model
    for earlier in reversed(spec.stages[:index]):
        if yields(earlier) is ArtifactKind.POLICY:
            return earlier.name
    return BASE_MODEL


def references(spec: PipelineSpec, index: int) -> Iterator[Reference]:
    """Every input that a stage names or implies, the policy first (or the policies, where it merges several)."""
    stage = spec.stages[index]
    if stage.merge is not None and stage.merge.method is not None:
        yield from _merged_models(stage.merge, f"spec.stages[{index}].merge")
        return
    kind, value, here = STAGE_TYPES[stage.type], stage.value, f"spec.stages[{index}]"
    yield Reference("model", f"{here}.model", start_of(spec, index), ArtifactKind.POLICY, implied=stage.model is None)
    if isinstance(value, SampledStage):
        yield from _online_inputs(value, f"{here}.{stage.type}", kind.dataset_formats or frozenset())
    elif kind.dataset_formats is not None:
        yield Reference(
            "dataset", f"{here}.{stage.type}.dataset", value.dataset, ArtifactKind.DATASET, kind.dataset_formats
        )
    if (reference := getattr(value, "reference", None)) is not None:
        yield Reference("reference", f"{here}.{stage.type}.reference", reference, ArtifactKind.POLICY)
    if isinstance(value, PolicyStage):
        for number, item in enumerate(value.rehearsal or ()):
            yield Reference(
                f"rehearsal.{number}.dataset",
                f"{here}.{stage.type}.rehearsal[{number}].dataset",
                item.dataset,
                ArtifactKind.DATASET,
                REHEARSAL_FORMATS,
            )
    if isinstance(value, KlStage) and value.kl is not None and not value.kl.is_start:
        named = "reference" if value.kl.reference is not None else "baseModel"
        target = BASE_MODEL if value.kl.reference is None else value.kl.reference
        yield Reference("kl.reference", f"{here}.{stage.type}.kl.{named}", target, ArtifactKind.POLICY)
    if isinstance(value, PolicyStage) and value.ewc is not None:
        yield Reference(
            "ewc.dataset",
            f"{here}.{stage.type}.ewc.dataset",
            value.ewc.dataset,
            ArtifactKind.DATASET,
            REHEARSAL_FORMATS,
        )
    if stage.evaluate is not None:
        baseline = stage.evaluate.baseline
        yield Reference(
            "baseline",
            f"{here}.evaluate.baseline",
            BASE_MODEL if baseline is None else baseline,
            ArtifactKind.POLICY,
            implied=baseline is None,
        )
        for number, suite in enumerate(stage.evaluate.suites):
            yield Reference(
                f"suites.{number}.dataset",
                f"{here}.evaluate.suites[{number}].{suite.choice}.dataset",
                suite.dataset,
                ArtifactKind.DATASET,
                SUITE_FORMATS[suite.choice],
                split=suite.value.split,
            )
            if suite.win_rate is not None and suite.win_rate.judge.stage is not None:
                yield Reference(
                    f"suites.{number}.judge",
                    f"{here}.evaluate.suites[{number}].winRate.judge.stage",
                    suite.win_rate.judge.stage,
                    ArtifactKind.REWARD_MODEL,
                )


def _online_inputs(stage: SampledStage, here: str, formats: frozenset[str]) -> Iterator[Reference]:
    """What a stage that samples reads besides the policy and its reference."""
    yield Reference("prompts", f"{here}.prompts", stage.prompts, ArtifactKind.DATASET, formats)
    for number, reward in enumerate(stage.rewards):
        if reward.stage is not None:
            yield Reference(
                f"rewards.{number}.stage", f"{here}.rewards[{number}].stage", reward.stage, ArtifactKind.REWARD_MODEL
            )
    critic = getattr(stage, "critic", None)
    if critic is not None and critic.start is not None:
        yield Reference("critic.start", f"{here}.critic.start", critic.start, ArtifactKind.REWARD_MODEL)
    sycophancy = getattr(stage, "sycophancy", None)
    if sycophancy is not None and sycophancy.dataset is not None:
        yield Reference(
            "sycophancy.dataset",
            f"{here}.sycophancy.dataset",
            sycophancy.dataset,
            ArtifactKind.DATASET,
            PREFERENCE_FORMATS,
            split="test",
        )


def _merged_models(merge: Merge, here: str) -> Iterator[Reference]:
    """The models in declared order, and the base where the method counts changes from one."""
    for number, model in enumerate(merge.models or []):
        target = BASE_MODEL if model.stage is None else model.stage
        yield Reference(f"models.{number}", f"{here}.models[{number}].stage", target, ArtifactKind.POLICY)
    if merge.method in BASED_METHODS:
        target = BASE_MODEL if merge.base is None else merge.base
        yield Reference("base", f"{here}.base", target, ArtifactKind.POLICY, implied=merge.base is None)


def dependencies(spec: PipelineSpec, index: int) -> list[str]:
    """Names of the stages that must have succeeded before a stage starts, in order of mention."""
    stages = {stage.name for stage in spec.stages}
    named = [ref.target for ref in references(spec, index) if ref.target in stages] + spec.stages[index].after
    return list(dict.fromkeys(name for name in named if name in stages))


def find_cycle(spec: PipelineSpec) -> list[str] | None:
    """A cycle of stage names, if there is one."""
    edges = {stage.name: dependencies(spec, index) for index, stage in enumerate(spec.stages)}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for target in edges[name]:
            if (cycle := visit(target, [*path, name])) is not None:
                return cycle
        done.add(name)
        return None

    for name in edges:
        if (cycle := visit(name, [])) is not None:
            return cycle
    return None
