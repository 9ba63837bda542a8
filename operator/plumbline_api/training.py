"""Parameters that every training stage shares."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from plumbline_api.base import Contract, Name

PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["auto", "float32", "bfloat16"]


class Lora(Contract):
    """Low-rank adaptation (Hu et al. 2021): train B·A beside frozen weights, scaled by alpha/rank."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank r of the two factors."""
    alpha: Annotated[float, Field(gt=0, le=65536)] | None = None
    """Scale numerator; the delta is alpha/rank · B·A. Absent: twice the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input during training."""
    targets: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=1, max_length=32)] | None
    ) = None
    """Names (suffixes) of the linear layers to adapt. Absent: every linear layer but the output head."""


class Schedule(Contract):
    """How the learning rate moves over the steps."""

    type: Literal["constant", "linear", "cosine"] = "linear"
    """Shape after the warm-up: constant, linear to zero, or half a cosine to zero."""
    warmup_ratio: Share = 0.03
    """Share of all steps in which the rate rises linearly from zero."""


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
    tokens_per_batch: Annotated[int, Field(ge=64, le=4194304)] = 4096
    """Token budget of one micro-batch on one rank; a memory setting, it does not change results beyond rounding."""
    max_length: Annotated[int, Field(ge=8, le=1048576)] = 1024
    """Longest sequence in tokens; longer rows are truncated and counted."""
    schedule: Schedule = Schedule()
    """Learning-rate schedule."""
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
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_every_steps: PositiveInt = 20
    """Optimizer steps between two checkpoints in storage."""
    evaluate_every_steps: PositiveInt | None = None
    """Optimizer steps between two evaluations on the evaluation split. Absent: at the start and the end only."""


class TrainingStage(Contract):
    """Fields of every stage that trains a policy."""

    dataset: Name
    """Name of the dataset to train on."""
    lora: Lora | None = None
    """Train a low-rank adapter instead of all weights."""
    training: Training = Training()
    """Optimisation parameters."""


class Pretrain(TrainingStage):
    """Continued pre-training: next-token loss on every token of raw text."""

    training: Training = Training(max_length=2048)
    """Optimisation parameters."""


class Sft(TrainingStage):
    """Supervised fine-tuning on prompts and answers."""

    loss_on: Literal["completion", "all", "assistant"] = "completion"
    """Tokens that carry loss: those of the last answer, all tokens, or every assistant turn."""


DpoLoss = Literal["sigmoid", "robust", "ipo", "ipoSum", "hinge", "exo", "nca", "apoZero", "apoDown"]
SMOOTHED_LOSSES = frozenset({"sigmoid", "robust", "exo"})
"""Losses of dpo that label smoothing changes."""
EXO_SMOOTHING = 1e-3
"""Label smoothing of exo where none is set."""
Beta = Annotated[float, Field(gt=0, le=100)]
SftWeight = Annotated[float, Field(ge=0, le=100)]


class Dpo(TrainingStage):
    """Direct preference optimisation (Rafailov et al. 2023) and its relatives with a reference."""

    beta: Beta = 0.1
    """Strength of the pull towards the reference; of ipo and ipoSum the paper's τ."""
    loss: DpoLoss = "sigmoid"
    """Form of the preference loss. ipo takes means over tokens, ipoSum sums; apoZero suits chosen answers better than the policy's own, apoDown worse ones."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """Share of pairs whose answers are believed to be swapped: with sigmoid the conservative loss, with robust the unbiased one, with exo the target. Absent: 0, with exo 0.001."""
    length_normalized: bool = False
    """Take log-ratios as means over the tokens of an answer instead of sums."""
    sft_weight: SftWeight = 0.0
    """Weight α of the likelihood of chosen answers (RPO): plus α times the mean of −log p over the tokens of each."""
    reference: Name | None = None
    """Stage whose policy is the reference. Absent: the policy at the start of this stage."""

    @field_validator("label_smoothing")
    @classmethod
    def _check_label_smoothing(cls, value: float | None, info: ValidationInfo) -> float | None:
        loss = info.data.get("loss")
        if value and loss is not None and loss not in SMOOTHED_LOSSES:
            fits = ", ".join(sorted(SMOOTHED_LOSSES))
            raise ValueError(
                f"{value} with loss {loss}, which has no label smoothing; leave it out, or take loss {fits}"
            )
        if loss == "exo" and value == 0:
            raise ValueError(f"0 with loss exo, which needs a share above 0; leave it out for {EXO_SMOOTHING}")
        return value

    @field_validator("length_normalized")
    @classmethod
    def _check_length_normalized(cls, value: bool, info: ValidationInfo) -> bool:
        loss = info.data.get("loss")
        if value and loss == "ipo":
            raise ValueError("true with loss ipo, which takes means over tokens by itself; leave it out")
        if value and loss == "ipoSum":
            raise ValueError("true with loss ipoSum, which takes sums; leave it out, or take loss ipo for means")
        return value

    def model_post_init(self, _context: Any) -> None:
        """Refuse a loss that lacks what it is made of."""
        if self.loss == "robust" and self.label_smoothing is None:
            raise ValueError("loss robust needs labelSmoothing, the share of pairs believed to be swapped, such as 0.1")

    @property
    def takes_label_smoothing(self) -> bool:
        """Whether the loss is a function of it."""
        return self.loss in SMOOTHED_LOSSES

    @property
    def smoothing(self) -> float:
        """The label smoothing in force."""
        if self.label_smoothing is None:
            return EXO_SMOOTHING if self.loss == "exo" else 0.0
        return self.label_smoothing

    @property
    def uses_means(self) -> bool:
        """Whether log-ratios are means over tokens."""
        return self.length_normalized or self.loss == "ipo"


class Orpo(TrainingStage):
    """Odds-ratio preference optimisation (Hong et al. 2024): likelihood plus beta times an odds-ratio loss, no reference."""

    beta: Beta = 0.1
    """Weight of the odds-ratio loss, the paper's λ."""
    sft_on: Literal["all", "completion"] = "all"
    """Tokens of the likelihood: prompt and chosen answer as in the authors' code, or the answer alone."""


class Simpo(TrainingStage):
    """Simple preference optimisation (Meng et al. 2024): a margin between mean log-probabilities, no reference."""

    beta: Beta = 2.0
    """Scale of the rewards: beta times the mean log-probability of an answer's tokens."""
    gamma: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Margin by which the chosen answer's reward should exceed the rejected one's."""
    sft_weight: SftWeight = 0.0
    """Weight of the likelihood of chosen answers, the mean of −log p over the tokens of each."""


class Cpo(TrainingStage):
    """Contrastive preference optimisation (Xu et al. 2024): the loss of dpo without a reference, plus likelihood."""

    beta: Beta = 0.1
    """Scale of the difference of log-probabilities."""
    sft_weight: SftWeight = 1.0
    """Weight of the likelihood of chosen answers, the mean of −log p over the tokens of each."""


class Rrhf(TrainingStage):
    """Rank responses (Yuan et al. 2023): mean log-probabilities in the order of the ranks, plus likelihood of the best."""

    sft_weight: SftWeight = 1.0
    """Weight of the likelihood of best answers, the mean of −log p over the tokens of each."""


TRAINING_STAGES: dict[str, type[TrainingStage]] = {
    "pretrain": Pretrain,
    "sft": Sft,
    "dpo": Dpo,
    "orpo": Orpo,
    "simpo": Simpo,
    "cpo": Cpo,
    "rrhf": Rrhf,
}
"""Parameters of the stages that train a policy, by stage type."""

DEFAULT_LEARNING_RATES: dict[str, tuple[float, float]] = {
    "pretrain": (2e-4, 2e-5),
    "sft": (2e-4, 2e-5),
    "dpo": (5e-6, 1e-6),
    "orpo": (5e-6, 1e-6),
    "simpo": (5e-6, 1e-6),
    "cpo": (5e-6, 1e-6),
    "rrhf": (5e-6, 1e-6),
}
"""Peak learning rate with LoRA and without, by stage type."""
