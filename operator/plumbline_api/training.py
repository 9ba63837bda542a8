"""Parameters that every training stage shares."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from plumbline_api.base import Contract, Name

PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Precision = Literal["auto", "float32", "bfloat16"]
ModuleName = Annotated[str, Field(min_length=1, max_length=128)]


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
    """Names (suffixes) of modules to train whole beside the adapter, such as embed_tokens, lm_head or norms."""
    quantization: Literal["nf4"] | None = None
    """nf4: keep the frozen linear layers in 4 bits while training (QLoRA); needs CUDA and bitsandbytes in the image."""


class Freeze(Contract):
    """Weights that stay as they are, with LoRA and without."""

    layers: Annotated[int, Field(ge=-4096, le=4096)] = 0
    """So many blocks from the first; a negative number freezes all but the last so many."""
    modules: Annotated[list[ModuleName], Field(max_length=32)] = []
    """Names (suffixes, * stands for anything) of modules, such as embed_tokens or mlp, with everything in them."""


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
    freeze: Freeze | None = None
    """What is not trained."""
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


class Dpo(TrainingStage):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Strength of the pull towards the reference: the loss is −log σ(β·Δ)."""
    loss: Literal["sigmoid"] = "sigmoid"
    """Form of the preference loss."""
    reference: Name | None = None
    """Stage whose policy is the reference. Absent: the policy at the start of this stage."""


DEFAULT_LEARNING_RATES: dict[str, tuple[float, float]] = {
    "pretrain": (2e-4, 2e-5),
    "sft": (2e-4, 2e-5),
    "dpo": (5e-6, 1e-6),
}
"""Peak learning rate with LoRA and without, by stage type."""
