"""The stage types: what each takes, yields and is called. The union grows by addition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from plumbline_api.artifacts import (
    LIKELIHOOD_FORMATS,
    PREFERENCE_FORMATS,
    PROMPT_FORMATS,
    RANKING_FORMATS,
    SUPERVISED_FORMATS,
    TEXT_FORMATS,
    UNPAIRED_FORMATS,
    ArtifactKind,
)
from plumbline_api.base import Contract, Duration, Name, OneOf, Quantity
from plumbline_api.evaluation import Evaluate, Gate
from plumbline_api.methods import Cpo, Dpo, Kto, Orpo, Pretrain, RewardModel, Rrhf, Sft, Simpo
from plumbline_api.online import AbortRule, Grpo, OnAbort, Ppo, Reinforce, Rloo
from plumbline_api.training import Share


class Resources(Contract):
    """What a stage asks of the cluster; everything else about its pods belongs to the runtime."""

    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Pods that work together, one per node."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = None
    """Accelerators per pod. Absent: the runtime's default for the stage's class."""
    cpu: Quantity | None = None
    """CPU request per pod. Absent: the runtime's."""
    memory: Quantity | None = None
    """Memory request and limit per pod. Absent: the runtime's."""


class MergeModel(Contract):
    """One of several models that are merged."""

    stage: Name | None = None
    """Stage whose policy takes part. Absent: spec.model."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Its share; the weights of all models are divided by their sum."""


class Merge(Contract):
    """Write full weights in Hugging Face layout: of a chain of adapters, one rounding per delta, or of several models."""

    method: Literal["linear", "slerp", "ties", "dareLinear", "dareTies"] | None = None
    """How several models become one, weight by weight. Absent: the chain of adapters of one policy."""
    models: Annotated[list[MergeModel], Field(min_length=2, max_length=16)] | None = None
    """The models, for a method."""
    base: Name | None = None
    """ties, dare: stage whose policy changes are counted from. Absent: spec.model."""
    t: Share | None = None
    """slerp: place between the first model (0) and the second (1). Absent: 0.5."""
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """ties, dare: share of each model's changes that is kept. Absent: 0.2 for ties, 0.5 for dare."""
    scale: Annotated[float, Field(gt=0, le=100)] | None = None
    """ties, dare: factor on the merged change. Absent: 1."""
    storage_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the written weights. auto: the type the chain was trained on, so that nothing is rounded twice."""


class Stage(OneOf):
    """One step of a pipeline: a name, optional common fields and exactly one type."""

    one_of_noun: ClassVar[str] = "stage type"

    name: Name
    """Name of the stage; other stages refer to its output by it."""
    model: Name | None = None
    """Stage whose policy this stage starts from. Absent: the nearest earlier stage that yields a policy, else spec.model."""
    after: Annotated[list[Name], Field(max_length=64)] = []
    """Stages that must have succeeded before this one starts, besides those it refers to."""
    resources: Resources = Resources()
    """What the stage asks of the cluster."""
    gates: Annotated[list[Gate], Field(max_length=16)] = []
    """Conditions on the stage's metrics; if one does not hold the stage fails and nothing that depends on it starts."""
    abort_when: Annotated[list[AbortRule], Field(max_length=16)] = []
    """ppo and its kin: stop the stage when a figure goes astray; its output is the last weights before."""
    on_abort: OnAbort | None = None
    """Whether an aborted stage fails or what depends on it goes on with its output. Absent: fail."""
    retries: Annotated[int, Field(ge=0, le=20)] = 2
    """Further attempts after a transient failure. Preemption and bad input do not count: the first is free, the second is never retried."""
    timeout: Duration | None = None
    """Longest time one attempt may run."""
    cache: bool = True
    """Take the output from storage when the same stage with the same inputs has been computed before."""

    pretrain: Pretrain | None = None
    """Continued pre-training on raw text."""
    sft: Sft | None = None
    """Supervised fine-tuning on prompts and answers."""
    reward_model: RewardModel | None = None
    """Reward model on preference pairs or ranked answers."""
    dpo: Dpo | None = None
    """Direct preference optimisation on preference pairs, against a reference."""
    kto: Kto | None = None
    """Kahneman-Tversky optimisation on labelled answers or preference pairs."""
    orpo: Orpo | None = None
    """Odds-ratio preference optimisation on preference pairs, without a reference."""
    simpo: Simpo | None = None
    """Simple preference optimisation on preference pairs, without a reference."""
    cpo: Cpo | None = None
    """Contrastive preference optimisation on preference pairs, without a reference."""
    rrhf: Rrhf | None = None
    """Learning from ranked responses, without a reference."""
    ppo: Ppo | None = None
    """Proximal policy optimisation on rewards of sampled answers, with a critic."""
    grpo: Grpo | None = None
    """Group-relative policy optimisation on rewards of sampled answers."""
    rloo: Rloo | None = None
    """REINFORCE with a leave-one-out baseline on rewards of sampled answers."""
    reinforce: Reinforce | None = None
    """REINFORCE++ on rewards of sampled answers."""
    merge: Merge | None = None
    """Merge adapters into full weights for serving, or several models into one."""
    evaluate: Evaluate | None = None
    """Measure a policy against a baseline."""

    @classmethod
    def common_fields(cls) -> frozenset[str]:
        """Fields that every stage has."""
        return frozenset(
            {"name", "model", "after", "resources", "gates", "abort_when", "on_abort", "retries", "timeout", "cache"}
        )

    @property
    def type(self) -> str:
        """The stage type, such as `sft`."""
        return self.choice


RuntimeClass = Literal["train", "generate", "cpu"]


@dataclass(frozen=True, slots=True)
class StageType:
    """What the planner and the checker know about a stage type."""

    name: str
    numerics_version: int
    """Raised when the same input would give another output; part of every fingerprint."""
    yields: ArtifactKind
    runtime_class: RuntimeClass
    dataset_formats: frozenset[str] | None = None
    """Formats that the field `dataset` (of stages that sample, `prompts`) takes; None where the type has no such field."""
    takes_policy: bool = True


STAGE_TYPES: dict[str, StageType] = {
    kind.name: kind
    for kind in (
        StageType("pretrain", 1, ArtifactKind.POLICY, "train", TEXT_FORMATS),
        StageType("sft", 1, ArtifactKind.POLICY, "train", SUPERVISED_FORMATS),
        StageType("rewardModel", 1, ArtifactKind.REWARD_MODEL, "train", RANKING_FORMATS),
        StageType("dpo", 1, ArtifactKind.POLICY, "train", PREFERENCE_FORMATS),
        StageType("kto", 1, ArtifactKind.POLICY, "train", UNPAIRED_FORMATS),
        StageType("orpo", 1, ArtifactKind.POLICY, "train", PREFERENCE_FORMATS),
        StageType("simpo", 1, ArtifactKind.POLICY, "train", PREFERENCE_FORMATS),
        StageType("cpo", 1, ArtifactKind.POLICY, "train", PREFERENCE_FORMATS),
        StageType("rrhf", 1, ArtifactKind.POLICY, "train", PREFERENCE_FORMATS),
        StageType("ppo", 1, ArtifactKind.POLICY, "train", PROMPT_FORMATS),
        StageType("grpo", 1, ArtifactKind.POLICY, "train", PROMPT_FORMATS),
        StageType("rloo", 1, ArtifactKind.POLICY, "train", PROMPT_FORMATS),
        StageType("reinforce", 1, ArtifactKind.POLICY, "train", PROMPT_FORMATS),
        StageType("merge", 1, ArtifactKind.POLICY, "cpu"),
        StageType("evaluate", 1, ArtifactKind.REPORT, "generate"),
    )
}

MERGE_DEFAULTS: dict[str, dict[str, float]] = {
    "linear": {},
    "slerp": {"t": 0.5},
    "ties": {"density": 0.2, "scale": 1.0},
    "dareLinear": {"density": 0.5, "scale": 1.0},
    "dareTies": {"density": 0.5, "scale": 1.0},
}
"""What each merge method reads besides the models, with its defaults."""
BASED_METHODS = frozenset({"ties", "dareLinear", "dareTies"})
"""Merge methods that work on changes from a base."""


def yields_of(stage_type: str, parameters: Mapping[str, Any]) -> ArtifactKind:
    """What a stage yields, given its parameters in wire form: a learning-rate range test yields a report."""
    if (parameters.get("training") or {}).get("rangeTest") is not None:
        return ArtifactKind.REPORT
    return STAGE_TYPES[stage_type].yields


REHEARSAL_FORMATS = SUPERVISED_FORMATS | TEXT_FORMATS
"""Formats whose rows can stand among others in a likelihood stage."""

SUITE_FORMATS: dict[str, frozenset[str]] = {
    "perplexity": LIKELIHOOD_FORMATS,
    "preferenceAccuracy": PREFERENCE_FORMATS,
    "winRate": SUPERVISED_FORMATS | PREFERENCE_FORMATS,
    "samples": SUPERVISED_FORMATS | PREFERENCE_FORMATS,
}
