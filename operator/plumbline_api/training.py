"""Parameters that every training stage shares."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.alias_generators import to_camel

from plumbline_api.base import Contract, Name

PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["auto", "float32", "bfloat16"]
ModuleName = Annotated[str, Field(min_length=1, max_length=128)]
TOKENS_ON_ACCELERATOR = 4096
"""Of a micro-batch, so that small models keep an accelerator busy."""
TOKENS_ON_CPU = 512
"""Of a micro-batch: larger ones take more memory and are no faster (`make bench-trainer`)."""


class Lora(Contract):
    """Low-rank adaptation (Hu et al. 2021): train B·A beside frozen weights, scaled by alpha/rank."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank r of the two factors."""
    alpha: Annotated[float, Field(gt=0, le=65536)] | None = None
    """Scale numerator; the delta is alpha/rank · B·A. Absent: twice the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input during training."""
    targets: Annotated[list[ModuleName], Field(min_length=1, max_length=32)] | None = None
    """Names (suffixes) of the linear layers to adapt. Absent: every linear layer but the output head."""
    rs_lora: bool = False
    """Scale by alpha/√rank (Kalajdzievski 2023), so that high ranks learn as fast as low ones."""
    dora: bool = False
    """DoRA (Liu et al. 2024): train the length of every output's weights apart from their direction."""
    modules_to_save: Annotated[list[ModuleName], Field(min_length=1, max_length=32)] | None = None
    """Names (suffixes) of modules to train whole, such as embed_tokens or lm_head."""
    quantization: Literal["nf4"] | None = None
    """nf4: keep the frozen linear layers in 4 bits while training (QLoRA); needs CUDA and bitsandbytes in the image."""


class Freeze(Contract):
    """Weights that stay as they are, with LoRA and without."""

    layers: Annotated[int, Field(ge=-4096, le=4096)] = 0
    """So many blocks from the first; a negative number freezes all but the last so many."""
    modules: Annotated[list[ModuleName], Field(max_length=32)] = []
    """Names (suffixes, * stands for anything) of modules, such as embed_tokens or mlp, with everything in them."""


SCHEDULE_FIELDS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "linear": ("final_ratio",),
    "cosine": ("final_ratio",),
    "cosineRestarts": ("final_ratio", "cycles"),
    "step": ("every_steps", "at", "factor"),
    "polynomial": ("final_ratio", "power"),
    "inverseSquareRoot": (),
}
"""Fields that belong to some shapes only."""


class Schedule(Contract):
    """Learning-rate schedule."""

    type: Literal["constant", "linear", "cosine", "cosineRestarts", "step", "polynomial", "inverseSquareRoot"] = (
        "linear"
    )
    """Shape after the warm-up."""
    warmup_ratio: Share = 0.03
    """Share of all steps in which the rate rises linearly from zero."""
    warmup_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Steps of the warm-up, instead of warmupRatio."""
    final_ratio: Share | None = None
    """linear, cosine, cosineRestarts, polynomial: where the rate ends, as a share of the peak. Absent: 0."""
    cycles: Annotated[int, Field(ge=1, le=10000)] | None = None
    """cosineRestarts: how often the rate runs down. Absent: 2."""
    every_steps: PositiveInt | None = None
    """step: multiply the rate by factor every so many steps after the warm-up."""
    at: Annotated[list[Share], Field(min_length=1, max_length=64)] | None = None
    """step: shares of all steps at which the rate is multiplied by factor, instead of everySteps."""
    factor: Annotated[float, Field(gt=0, lt=1)] | None = None
    """step: the factor. Absent: 0.1."""
    power: Annotated[float, Field(gt=0, le=100)] | None = None
    """polynomial: power of the share of steps that are left. Absent: 1."""

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        mine = SCHEDULE_FIELDS[self.type]
        for name in dict.fromkeys(field for fields in SCHEDULE_FIELDS.values() for field in fields):
            if getattr(self, name) is not None and name not in mine:
                owners = [kind for kind, fields in SCHEDULE_FIELDS.items() if name in fields]
                raise ValueError(
                    f"{to_camel(name)} belongs to type {' or '.join(owners)}, not to {self.type}; leave it out or "
                    "change type"
                )
        if self.type == "step" and (self.every_steps is None) == (self.at is None):
            raise ValueError("type step needs either everySteps or at (shares of all steps), not both")
        return self


class EarlyStopping(Contract):
    """Stop when a held-out figure no longer improves."""

    metric: Annotated[str, Field(pattern="^eval[A-Z][A-Za-z]*$", max_length=64)] = "evalLoss"
    """Figure of the evaluations, such as evalLoss or evalRewardAccuracy."""
    patience: Annotated[int, Field(ge=1, le=10000)] = 3
    """Evaluations in a row without an improvement after which the stage stops."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Least change that counts as an improvement."""
    mode: Literal["min", "max"] | None = None
    """Whether less or more is better. Absent: min for losses, max for accuracies and margins."""

    @model_validator(mode="after")
    def _has_a_direction(self) -> Self:
        if self.direction is None:
            raise ValueError(f"mode is needed: whether less (min) or more (max) of {self.metric} is better")
        return self

    @property
    def direction(self) -> Literal["min", "max"] | None:
        """`min` or `max`; None where neither the field nor the metric's name says."""
        if self.mode is not None:
            return self.mode
        if self.metric.endswith("Loss"):
            return "min"
        return "max" if self.metric.endswith(("Accuracy", "Margin")) else None


class RangeTest(Contract):
    """Sweep the learning rate step by step (Smith 2015) instead of training: yields a report with a suggestion, no policy."""

    lowest: Annotated[float, Field(gt=0, le=1, alias="from")] = 1e-7
    """Rate of the first step."""
    highest: Annotated[float, Field(gt=0, le=10, alias="to")] = 1e-1
    """Rate of the last step."""
    steps: Annotated[int, Field(ge=10, le=100000)] = 100
    """Steps of the sweep; it ends sooner where the loss diverges."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.lowest >= self.highest:
            raise ValueError(f"from ({self.lowest:g}) must be below to ({self.highest:g})")
        return self


class Training(Contract):
    """Optimisation parameters. AdamW with decoupled weight decay; trainable weights and their state are float32."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate. Absent: the default of the method, which differs between LoRA and full fine-tuning."""
    epochs: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Passes over the training rows."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps even if epochs are left."""
    global_batch: Annotated[int, Field(ge=1, le=65536)] = 16
    """Rows (or pairs) per optimizer step, over all ranks and micro-batches."""
    tokens_per_batch: Annotated[int, Field(ge=64, le=4194304)] | None = None
    """Tokens of a micro-batch on one rank; results stay the same up to rounding. Absent: 4096, on a CPU 512."""
    max_length: Annotated[int, Field(ge=8, le=1048576)] = 1024
    """Longest sequence in tokens; longer rows are truncated and counted."""
    schedule: Schedule = Schedule()
    """Learning-rate schedule."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor on the learning rate from each layer to the one below; top layer and head keep it whole."""
    l2sp: Annotated[float, Field(gt=0, le=1e6)] | None = Field(None, alias="l2sp")
    """Strength λ of ½λ‖Δ‖² (Li et al. 2018) on the change Δ of the weights since the stage's start; with LoRA Δ = s·B·A."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay on matrices; never on biases and norms."""
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Term that keeps the division of AdamW finite."""
    precision: Precision = "auto"
    """Precision of frozen weights and activations. auto: bfloat16 on an accelerator, float32 on a CPU."""
    gradient_checkpointing: bool | None = None
    """Recompute activations: less memory, a third more time. Absent: where memory would not do."""
    sharding: Literal["none", "full"] = "none"
    """full: share weights and optimizer state out over ranks (FSDP2); results stay the same up to rounding."""
    checkpoint_every_steps: PositiveInt = 20
    """Steps between two checkpoints."""
    evaluate_every_steps: PositiveInt | None = None
    """Steps between two evaluations on the evaluation split. Absent: at start and end only."""
    early_stopping: EarlyStopping | None = None
    """Stop when a held-out figure no longer improves."""
    select_best: bool | None = None
    """Yield the weights of the best evaluation, not the last ones. Absent: with earlyStopping only."""

    range_test: RangeTest | None = None
    """Sweep the learning rate."""

    @property
    def token_budget(self) -> int:
        """`tokens_per_batch`, which the stage's record has settled."""
        return self.tokens_per_batch or TOKENS_ON_ACCELERATOR

    @property
    def selects_best(self) -> bool:
        """Whether the output is the best evaluation's weights."""
        return self.early_stopping is not None if self.select_best is None else self.select_best

    @property
    def needs_evaluation(self) -> str | None:
        """The field that cannot do without an evaluation split, if one is set."""
        return "earlyStopping" if self.early_stopping is not None else "selectBest" if self.selects_best else None

    @model_validator(mode="after")
    def _evaluates_where_it_must(self) -> Self:
        if self.range_test is not None and self.needs_evaluation is not None:
            raise ValueError(f"a rangeTest yields no weights to choose from; leave {self.needs_evaluation} out")
        if self.needs_evaluation is not None and self.evaluate_every_steps is None:
            raise ValueError(f"{self.needs_evaluation} compares evaluations on the way; set evaluateEverySteps as well")
        return self


class TunedStage(Contract):
    """Fields of every stage that changes weights by gradients."""

    lora: Lora | None = None
    """Low-rank adaptation."""
    freeze: Freeze | None = None
    """Weights that stay."""
    training: Training = Training()
    """Optimisation parameters."""

    least_rows: ClassVar[int] = 1
    """Rows that a step cannot do without."""
    drops_at_random: ClassVar[bool] = False
    """Whether the adapter's dropout is on while the stage trains."""

    @property
    def step_needs(self) -> int:
        """Rows of whichever dataset that an optimizer step needs."""
        return self.least_rows

    @model_validator(mode="after")
    def _adapter_is_heard(self) -> Self:
        lora = self.lora
        if lora is not None and lora.dropout and not self.drops_at_random:
            raise ValueError(
                f"lora.dropout: {lora.dropout:g}, but only pretrain and sft drop at random: what this stage compares "
                "would differ by chance. Leave it out"
            )
        if lora is not None and lora.quantization is not None and self.training.sharding != "none":
            raise ValueError(
                "training.sharding cuts weights into rows, and lora.quantization packs them in blocks. "
                "Leave one of the two out"
            )
        if lora is not None and lora.dora and self.training.l2sp is not None:
            raise ValueError(
                "training.l2sp holds products of two factors, and lora.dora changes weights by more than one. "
                "Leave one of the two out"
            )
        return self


class TrainingStage(TunedStage):
    """Fields of every stage that trains on given rows."""

    dataset: Name
    """Name of the dataset to train on."""
