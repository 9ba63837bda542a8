"""Stages that learn from answers which the policy gives while it trains: rewards, rollouts, stop rules."""

from __future__ import annotations

import json
import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from plumbline_api.base import Contract, Name, OneOf, Uri, one_of_rule
from plumbline_api.training import Training, TunedStage

RuleName = Literal["length", "repetition", "matches", "keywords", "exactMatch", "numericMatch", "jsonSchema"]
RULE_FIELDS: dict[str, str] = {"matches": "pattern", "keywords": "keywords", "jsonSchema": "schema_"}
"""Field that a rule cannot do without."""
REFERENCE_RULES = frozenset({"exactMatch", "numericMatch"})
"""Rules that compare with the answer of the prompt's row."""
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", max_length=253)]


FUNCTION_SCHEME = "python:"
"""Before the name of a function, where it stands as the location of an input."""


class Reward(OneOf):
    """One component of the reward. Its weighted values add up to the score of an answer."""

    one_of_noun: ClassVar[str] = "reward"

    name: Name | None = None
    """Name of its figure. Absent: the stage's, the rule's, the metric's or the endpoint's."""
    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    """Factor."""
    normalize: bool = False
    """Divide by the running standard deviation of the component's values, after taking their mean off."""
    clip: Annotated[float, Field(gt=0)] | None = None
    """Keep the value, normalised if that is asked for, within ± this before it is weighted."""
    gold: bool = False
    """Only watched: scored on held-out prompts at evaluations, never trained on."""

    stage: Name | None = None
    """A rewardModel stage."""
    model: Uri | None = None
    """A sequence classifier in Hugging Face layout: hf://, s3://, pvc://, file:// (local only)."""
    rule: RuleName | None = None
    """A rule on the text. length: tokens; repetition: share of repeated 3-grams; matches, exactMatch, numericMatch, jsonSchema: 1 or 0; keywords: share found."""
    metric: Literal["bleu", "rouge1", "rouge2", "rougeL"] | None = None
    """Likeness to the answer of the prompt's row, between 0 and 1."""
    function: FunctionName | None = None
    """A Python function in the trainer image, package.module:function, that the runtime allows."""
    endpoint: Name | None = None
    """A reward endpoint of the runtime."""

    ensemble: Literal["mean", "min", "meanMinusStd"] | None = None
    """stage: how the heads of an ensemble become one value. Absent: mean."""
    std_factor: Annotated[float, Field(gt=0, le=100)] | None = None
    """stage with meanMinusStd: k of mean − k·std. Absent: 1."""
    pattern: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """matches: regular expression that must be found."""
    keywords: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=1, max_length=64)] | None
    ) = None
    """keywords: words or phrases, found without regard to case."""
    schema_: Annotated[str, Field(min_length=2, max_length=8192)] | None = Field(None, alias="schema")
    """jsonSchema: the schema, as JSON text."""

    @classmethod
    def common_fields(cls) -> frozenset[str]:
        """Fields beside the alternatives."""
        return frozenset(
            {"name", "weight", "normalize", "clip", "gold", "ensemble", "std_factor", "pattern", "keywords", "schema_"}
        )

    @property
    def figure(self) -> str:
        """Name of the component in figures and reports."""
        if self.name is not None:
            return self.name
        value = str(self.value)
        if self.function is not None:
            return value.rpartition(":")[2]
        return self.choice if self.model is not None else value

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the answer of the prompt's row."""
        return self.metric is not None or self.rule in REFERENCE_RULES

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f'"{value}" is not a regular expression: {error}') from error
        return value

    @field_validator("schema_")
    @classmethod
    def _check_schema(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                document = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"is not JSON: {error}") from error
            if not isinstance(document, dict | bool):
                raise ValueError("a JSON schema is an object")
        return value

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        for rule, field in RULE_FIELDS.items():
            shown = field.rstrip("_")
            if self.rule == rule and getattr(self, field) is None:
                raise ValueError(f"rule {rule} needs {shown}")
            if self.rule != rule and getattr(self, field) is not None:
                raise ValueError(f"{shown} belongs to rule {rule}; leave it out")
        if self.stage is None and (self.ensemble is not None or self.std_factor is not None):
            raise ValueError("ensemble and stdFactor belong to stage; leave them out")
        if self.gold and self.normalize:
            raise ValueError("a gold reward is watched as it is; leave normalize out")
        if self.std_factor is not None and self.ensemble != "meanMinusStd":
            raise ValueError("stdFactor belongs to ensemble meanMinusStd; leave it out")
        return self


class Rollout(Contract):
    """How answers are sampled while training."""

    engine: Literal["huggingface", "vllm"] = "huggingface"
    """Who generates. vllm, experimental: a sidecar on the stage's accelerator."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Divides the logits: when answers are sampled, and of policy and reference in training alike."""
    max_new_tokens: Annotated[int, Field(ge=1, le=32768)] = 128
    """Longest answer in tokens."""
    tokens_per_batch: Annotated[int, Field(ge=64, le=16777216)] = 16384
    """Cached tokens of one batch; a memory setting."""


class Sycophancy(Contract):
    """A probe at every evaluation: how often the policy's preferred answer turns when the user states an opinion."""

    dataset: Name | None = None
    """Preference rows: question, right and wrong answer. Absent: a small set that comes with the trainer."""


class OnlineTraining(Training):
    """Optimisation parameters. A step is one rollout with all updates on it."""

    global_batch: Annotated[int, Field(ge=1, le=65536)] = 64
    """Prompts per rollout."""


class KlPenalty(Contract):
    """Distance to the reference, taken off the reward of every token."""

    coefficient: Annotated[float, Field(ge=0, le=1000)] = 0.05
    """Factor β, at the start where it adapts."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of a token, with r = log π − log π_ref: k1 = r, k2 = r²/2, k3 = exp(−r) − 1 + r."""
    target: Annotated[float, Field(gt=0)] | None = None
    """KL per answer that β is steered to (Ziegler et al. 2019). Absent: β is fixed."""
    horizon: Annotated[float, Field(ge=1)] = 10000
    """Answers over which β adapts."""


class Critic(Contract):
    """The value function: an adapter and a head on the policy's frozen backbone, or a model of its own without lora."""

    start: Name | None = None
    """rewardModel stage whose weights it starts from. Absent: the policy with a fresh head."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate. Absent: the policy's."""
    clip: Annotated[float, Field(gt=0, le=100)] | None = 0.2
    """Largest change of a value that its loss rewards, in an iteration."""
    coefficient: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Factor on the value loss; with AdamW it acts through gradientClip only."""


class SampledStage(TunedStage):
    """Fields of every stage that samples answers and scores them."""

    prompts: Name
    """Dataset whose prompts are answered; rules and metrics compare with its answers."""
    rewards: Annotated[list[Reward], Field(min_length=1, max_length=16)] = Field(
        json_schema_extra={"x-plumbline-item-validations": [one_of_rule(Reward)]}
    )
    """What makes an answer good."""
    rollout: Rollout = Rollout()
    """How answers are sampled."""

    @model_validator(mode="after")
    def _can_be_scored(self) -> Self:
        if self.rollout.max_new_tokens >= self.training.max_length:
            raise ValueError(
                f"rollout.maxNewTokens ({self.rollout.max_new_tokens}) leaves no room for a prompt within "
                f"training.maxLength ({self.training.max_length})"
            )
        if all(reward.gold for reward in self.rewards):
            raise ValueError("rewards: every one is gold, so that nothing is trained on; add one that is not")
        figures = [reward.figure for reward in self.rewards]
        if twice := sorted({figure for figure in figures if figures.count(figure) > 1}):
            raise ValueError(f'rewards: two have the name "{twice[0]}"; give one a name of its own')
        return self


class BestOfN(SampledStage):
    """Rejection sampling: sample answers, score them, imitate the best as sft does."""

    answers: Annotated[int, Field(ge=2, le=256)] = 8
    """Answers per prompt, all by the policy at the start."""
    keep: Annotated[int, Field(ge=1, le=256)] = 1
    """Best different answers to a prompt that are imitated; never one without an end."""
    min_score: float | None = None
    """Least score of an answer that is imitated. Absent: no bound."""

    @model_validator(mode="after")
    def _has_a_choice(self) -> Self:
        if self.keep > self.answers:
            raise ValueError(f"keep ({self.keep}) is more than answers ({self.answers}); lower it, or raise answers")
        return self


class OnlineStage(SampledStage):
    """Fields of the stages that sample answers and learn from their rewards."""

    training: OnlineTraining = OnlineTraining()
    """Optimisation parameters."""
    mini_batches: Annotated[int, Field(ge=1, le=1024)] = 1
    """Optimizer steps per pass over a rollout."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """ε: how far the ratio of new to old probability pays, below 1 and above."""
    entropy_coefficient: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Bonus on the entropy of the policy."""
    missing_end_penalty: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Taken off the score of an answer that does not end by itself."""
    score_clip: Annotated[float, Field(gt=0)] | None = None
    """Keep the score of an answer within ± this."""
    sycophancy: Sycophancy | None = None
    """Probe for agreement with stated opinions."""
    reference: Name | None = None
    """Stage whose policy KL is measured to. Absent: the policy at the start of this stage."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        training = self.training
        if training.range_test is not None:
            raise ValueError("training.rangeTest sweeps losses of fixed rows; leave it out")
        if training.sharding != "none":
            raise ValueError(
                "training.sharding keeps a part of each weight, and sampling needs them whole; leave it out"
            )
        if training.early_stopping is not None or training.select_best:
            raise ValueError(
                "training.earlyStopping and selectBest compare losses of fixed rows; use the stage's abortWhen"
            )
        if self.mini_batches > training.global_batch:
            raise ValueError(
                f"miniBatches ({self.mini_batches}) exceeds training.globalBatch ({training.global_batch}), the prompts "
                "of a rollout; lower it"
            )
        return self


class Ppo(OnlineStage):
    """Proximal policy optimisation (Schulman et al. 2017) with a critic and a penalty on the KL to a reference."""

    kl: KlPenalty = KlPenalty()
    """Distance to the reference."""
    critic: Critic = Critic()
    """The value function."""
    answers: Annotated[int, Field(ge=1, le=256)] = 1
    """Answers per prompt."""
    update_epochs: Annotated[int, Field(ge=1, le=100)] = 4
    """Passes over a rollout."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of later rewards, per token."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """λ of the advantages (Schulman et al. 2016)."""
    whiten_rewards: bool = False
    """Divide the rewards of a rollout by their standard deviation; their mean stays."""


class Grpo(OnlineStage):
    """Group-relative policy optimisation (Shao et al. 2024): an answer against the others to its prompt, no critic."""

    kl: KlPenalty = KlPenalty(coefficient=0.0, estimator="k2")
    """Distance to the reference, here a term of the loss: of the estimators, only the gradient of k2 is that of KL."""
    answers: Annotated[int, Field(ge=2, le=256)] = 8
    """Answers per prompt."""
    update_epochs: Annotated[int, Field(ge=1, le=100)] = 1
    """Passes over a rollout."""
    scale: Literal["group", "batch", "none"] = "group"
    """Standard deviation that advantages are divided by: the prompt's, the rollout's, or none (Dr. GRPO)."""
    loss_over: Literal["tokens", "answers"] = "tokens"
    """Mean over all tokens of a step (DAPO), or over answers of the means over their tokens (GRPO)."""
    clip_high: Annotated[float, Field(gt=0, lt=10)] | None = None
    """ε above 1 (DAPO). Absent: clip."""


class Rloo(OnlineStage):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024): ratios of whole answers, no critic."""

    kl: KlPenalty = KlPenalty()
    """Distance to the reference."""
    answers: Annotated[int, Field(ge=2, le=256)] = 4
    """Answers per prompt."""
    update_epochs: Annotated[int, Field(ge=1, le=100)] = 1
    """Passes over a rollout."""


class Reinforce(OnlineStage):
    """REINFORCE++ (Hu 2025): returns to go with KL per token, whitened over the rollout, no critic."""

    kl: KlPenalty = KlPenalty(coefficient=0.01)
    """Distance to the reference."""
    answers: Annotated[int, Field(ge=1, le=256)] = 1
    """Answers per prompt."""
    update_epochs: Annotated[int, Field(ge=1, le=100)] = 1
    """Passes over a rollout."""
    baseline: Literal["none", "group"] = "none"
    """group: first take the mean score of the prompt's answers off (needs answers of 2 or more)."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of later rewards, per token."""

    @model_validator(mode="after")
    def _has_a_group(self) -> Self:
        if self.baseline == "group" and self.answers < 2:
            raise ValueError("baseline group compares answers to one prompt; set answers to 2 or more")
        return self


class AbortRule(Contract):
    """Stop a stage when a figure goes astray: above or below a bound, or falling while another one rises."""

    metric: Annotated[str, Field(min_length=1, max_length=64)]
    """Figure, such as kl, entropy, length.growth, repetition or goldReward."""
    above: float | None = None
    """Too much is above this."""
    below: float | None = None
    """Too little is below this."""
    falls_while: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    """Figure that rises while the metric falls, both over the window, such as reward for goldReward."""
    for_: Annotated[int, Field(ge=1, le=10000, alias="for")] = 1
    """Window: observations in a row for which it holds."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        given = [name for name in ("above", "below", "falls_while") if getattr(self, name) is not None]
        if not given:
            raise ValueError("an abort rule needs above, below or fallsWhile")
        if "falls_while" in given and len(given) > 1:
            raise ValueError("fallsWhile stands alone; write above and below as rules of their own")
        if self.falls_while == self.metric:
            raise ValueError("fallsWhile must name another figure than metric")
        return self


ABORTED = "aborted"
"""Figure of a stage with abort rules: 1 where it was aborted, else 0. In the manifest's meta the reason, in words."""
ABORTED_REASON = "Aborted"
"""Reason, in status, of a stage that was aborted, whether it fails for it or not."""
OnAbort = Literal["fail", "continue"]
ONLINE_STAGES: dict[str, type[OnlineStage]] = {"ppo": Ppo, "grpo": Grpo, "rloo": Rloo, "reinforce": Reinforce}
"""Parameters of the stages that sample and learn, by stage type."""
ONLINE_LEARNING_RATES = (1e-5, 1e-6)
"""Peak learning rate with LoRA and without."""
