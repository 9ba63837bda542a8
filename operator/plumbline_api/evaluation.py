"""The evaluate stage: suites, judges, and the gates that read their figures."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from plumbline_api.base import Contract, Name, OneOf, Uri, one_of_rule
from plumbline_api.training import Precision

Split = Annotated[str, Field(pattern="^(train|evaluation|test)$")]


class Generation(Contract):
    """How answers are sampled."""

    max_new_tokens: Annotated[int, Field(ge=1, le=32768)] = 96
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """0 takes the likeliest token each time."""


class PerplexitySuite(Contract):
    """Perplexity of held-out rows: exp of the mean negative log-likelihood per token (of the answer, where rows have prompts)."""

    dataset: Name
    """Dataset whose rows are scored."""
    split: Split = "test"
    """Part of the dataset to read."""
    limit: Annotated[int, Field(ge=1, le=1000000)] | None = None
    """Score at most so many rows."""


class PreferenceAccuracySuite(Contract):
    """Share of held-out pairs of which the policy finds the chosen answer likelier per token (reference-free, length-normalised)."""

    dataset: Name
    """Preference dataset."""
    split: Split = "test"
    """Part of the dataset to read."""
    limit: Annotated[int, Field(ge=1, le=1000000)] | None = None
    """Score at most so many pairs."""


class RuleJudge(OneOf):
    """A programmatic judge: an answer that fulfils the rule beats one that does not; both or neither is a tie."""

    one_of_noun: ClassVar[str] = "rule"

    max_words: Annotated[int, Field(ge=1, le=100000)] | None = None
    """The answer has at most so many words (and at least one)."""
    max_sentences: Annotated[int, Field(ge=1, le=10000)] | None = None
    """The answer has at most so many sentences (and at least one word)."""
    matches: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """A regular expression is found in the answer."""


class ModelJudge(Contract):
    """A language model that is shown both answers in both orders and asked which is better."""

    source: Uri
    """Where the judge model lies: bundled://, file:// (local only), s3://, pvc:// or hf://."""
    rubric: Annotated[str, Field(min_length=1, max_length=2048)] = (
        "Which answer is more helpful, correct and to the point?"
    )
    """What the judge is asked."""


class Judge(OneOf):
    """Who decides which of two answers wins."""

    one_of_noun: ClassVar[str] = "judge"

    rule: RuleJudge | None = Field(None, json_schema_extra={"x-kubernetes-validations": [one_of_rule(RuleJudge)]})
    """A programmatic rule."""
    model: ModelJudge | None = None
    """A language model."""
    stage: Name | None = None
    """A rewardModel stage: the answer with the higher reward wins."""


class WinRateSuite(Contract):
    """Share of prompts on which the policy's answer beats the baseline's; a tie counts one half."""

    dataset: Name
    """Dataset whose prompts are answered."""
    split: Split = "test"
    """Part of the dataset to read."""
    judge: Judge = Field(json_schema_extra={"x-kubernetes-validations": [one_of_rule(Judge)]})
    """Who decides."""
    prompts: Annotated[int, Field(ge=2, le=100000)] = 64
    """Answer at most so many prompts."""
    generation: Generation = Generation()
    """How answers are sampled."""


class SamplesSuite(Contract):
    """Answers of the policy and of the baseline side by side, for people to read."""

    dataset: Name
    """Dataset whose prompts are answered."""
    split: Split = "test"
    """Part of the dataset to read."""
    prompts: Annotated[int, Field(ge=1, le=256)] = 8
    """Answer so many prompts."""
    generation: Generation = Generation()
    """How answers are sampled."""


class Suite(OneOf):
    """One thing to measure."""

    one_of_noun: ClassVar[str] = "suite"

    perplexity: PerplexitySuite | None = None
    """Held-out perplexity."""
    preference_accuracy: PreferenceAccuracySuite | None = None
    """Held-out preference accuracy."""
    win_rate: WinRateSuite | None = None
    """Win rate against the baseline."""
    samples: SamplesSuite | None = None
    """Answers side by side."""

    @property
    def dataset(self) -> str:
        """The dataset that the suite reads."""
        return str(self.value.dataset)


class Evaluate(Contract):
    """Measure a policy, and a baseline beside it, on held-out rows."""

    baseline: Name | None = None
    """Stage to compare with. Absent: the pipeline's starting model (spec.model)."""
    suites: Annotated[list[Suite], Field(min_length=1, max_length=16)] = Field(
        json_schema_extra={"x-plumbline-item-validations": [one_of_rule(Suite)]}
    )
    """What to measure. Metrics are named after the suite: perplexity, preferenceAccuracy, winRate, each with .lower and .upper."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Confidence level of the intervals."""
    precision: Precision = "auto"
    """Precision of weights and activations. auto: bfloat16 on an accelerator, float32 on a CPU."""
    tokens_per_batch: Annotated[int, Field(ge=64, le=4194304)] = 4096
    """Token budget of one scoring batch; a memory setting."""


class Gate(Contract):
    """A condition on one metric; a stage whose gate does not hold fails with reason GateFailed."""

    metric: Annotated[str, Field(min_length=1, max_length=128)]
    """Name of the metric, such as `winRate.lower` or `perplexity`."""
    at_least: float | None = None
    """Smallest value that passes."""
    at_most: float | None = None
    """Largest value that passes."""

    def model_post_init(self, _context: object) -> None:
        """A gate without a bound would always pass."""
        if self.at_least is None and self.at_most is None:
            raise ValueError("a gate needs atLeast, atMost or both")

    def holds(self, value: float) -> bool:
        """Whether a value passes."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)
