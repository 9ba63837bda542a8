"""What a stage will take: steps, tokens, memory and accelerator time. Estimates, and named so.

Memory of a training rank, in bytes: frozen weights in the resolved precision, 16 per trainable parameter (float32
weight, gradient and two AdamW moments), what penalties hold, activations of one micro-batch, and a constant for the
runtime. Activations per token and layer: about 10 hidden vectors, the attention's projections and 3 vectors of the
feed-forward width; with gradient checkpointing one hidden vector per layer and one layer in full. Logits are made in
chunks and do not count. Sharded, a rank holds its part of what is said above, and the embeddings and two layers whole
while they compute.

Tokens are those that go through the model in training: of a row with several answers the prompt counts once, because
the answers share it. What a frozen reference reads, once for all epochs, does not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plumbline_api.evaluation import Evaluate
from plumbline_api.methods import TRAINING_STAGES
from plumbline_api.record import StageRecord
from plumbline_api.training import Training, TunedStage

from plumbline_trainer.engine.schedule import plan_steps
from plumbline_trainer.planning.datasets import SplitFindings
from plumbline_trainer.planning.facts import ModelFacts

RUNTIME_BYTES = 800 * 2**20
ONE_ANSWER = frozenset({"pretrain", "sft"})
EVERY_ANSWER = frozenset({"rewardModel", "rrhf"})
"""Stages that read a row's answers one and all; what is in neither set reads pairs."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a stage will take; None is unknown."""

    steps: int | None = None
    tokens: int | None = None
    memory: int | None = None
    """Bytes on one rank."""
    gpu_hours: float | None = None


def estimate(
    stage: StageRecord,
    facts: ModelFacts,
    rows: SplitFindings | None,
    tokens_per_second: float | None,
    *,
    rehearsed: Sequence[SplitFindings] = (),
) -> Estimate:
    """Estimate one stage.

    Args:
        stage: its record.
        facts: of the base model.
        rows: its training rows; None for stages that do not train.
        tokens_per_second: training tokens per second and accelerator at 1B parameters; None if nobody says.
        rehearsed: training rows of the datasets that are mixed in, as declared.
    """
    if stage.type not in TRAINING_STAGES:
        return Estimate(memory=_inference_memory(stage, facts))
    model = TRAINING_STAGES[stage.type]
    parameters = model.model_validate({key: value for key, value in stage.parameters.items() if key != "seed"})
    training = parameters.training
    steps = tokens = gpu_hours = None
    if rows is not None and rows.rows:
        shares = [item.share for item in getattr(parameters, "rehearsal", None) or ()]
        plan = plan_steps(
            _names(rows),
            seed=0,
            global_batch=training.global_batch,
            epochs=training.epochs,
            max_steps=training.max_steps,
            rehearsal=[(_names(other), part) for other, part in zip(rehearsed, shares, strict=True)],
            least=parameters.least_rows,
        )
        steps = plan.steps if training.range_test is None else training.range_test.steps
        taken = steps * training.global_batch
        if training.range_test is None:
            taken = min(taken, math.ceil(max(training.epochs, 1 / rows.rows) * plan.rows_per_epoch))
        per_row = _mean_tokens(stage, rows, training.max_length) * (1.0 - sum(shares)) + sum(
            share * other.tokens(training.max_length) / other.rows
            for other, share in zip(rehearsed, shares, strict=True)
        )
        # The mismatched answers that kto takes its reference point from are as long as the others.
        tokens = round(taken * per_row * (2 if stage.type == "kto" else 1))
        if tokens_per_second is not None and stage.resources.gpus_per_node:
            rate = tokens_per_second * 1e9 / facts.parameters
            gpu_hours = round(tokens / rate / 3600, 4)
    longest = training.tokens_per_batch
    if rows is not None and rows.rows:
        row = _longest_row(stage, rows, training.max_length)
        # A micro-batch is part of a step, and a row longer than the budget stands alone.
        longest = max(row, min(longest, row * training.global_batch))
    parts = _ranks(stage) if training.sharding == "full" else 1
    return Estimate(steps, tokens, _training_memory(parameters, training, facts, longest, parts), gpu_hours)


def can_be_sharded(stage: StageRecord) -> bool:
    """Whether a stage has several ranks to share weights out over, and does not."""
    training = stage.parameters.get("training", {})
    return stage.type in TRAINING_STAGES and training.get("sharding", "none") == "none" and _ranks(stage) > 1


def _ranks(stage: StageRecord) -> int:
    return stage.resources.nodes * max(stage.resources.gpus_per_node or 1, 1)


def _names(rows: SplitFindings) -> list[str]:
    return [str(number) for number in range(rows.rows)]


def _mean_tokens(stage: StageRecord, rows: SplitFindings, max_length: int) -> float:
    """Tokens of a row that a training stage reads, in the mean."""
    if stage.type in ONE_ANSWER:
        return rows.tokens(max_length) / rows.rows
    packed = rows.packed(max_length, as_pairs=stage.type not in EVERY_ANSWER)
    return sum(packed) / len(packed)


def _longest_row(stage: StageRecord, rows: SplitFindings, max_length: int) -> int:
    """Tokens of the row that takes the most memory: its answers go through the model together."""
    if stage.type in ONE_ANSWER:
        return min(rows.percentile(100), max_length)
    return max(rows.packed(max_length, as_pairs=stage.type not in EVERY_ANSWER))


def lora_parameters(rank: int, targets: list[str] | None, facts: ModelFacts) -> int:
    """Trainable parameters of an adapter: r · (in + out) per adapted layer."""
    query, key_value = facts.heads * facts.head_size, facts.key_value_heads * facts.head_size
    layers = {
        "q_proj": facts.hidden + query,
        "k_proj": facts.hidden + key_value,
        "v_proj": facts.hidden + key_value,
        "o_proj": query + facts.hidden,
        "gate_proj": facts.hidden + facts.intermediate,
        "up_proj": facts.hidden + facts.intermediate,
        "down_proj": facts.hidden + facts.intermediate,
    }
    chosen = layers.values() if targets is None else [size for name, size in layers.items() if name in targets]
    return rank * facts.layers * sum(chosen)


def whole_parameters(modules: list[str], facts: ModelFacts) -> int:
    """Parameters of embeddings and head where they are trained whole; norms are too small to count."""
    large = sum(name.rpartition(".")[2] in ("embed_tokens", "wte", "lm_head", "embed_out") for name in modules)
    return large * facts.vocabulary * facts.hidden


def _training_memory(parameters: TunedStage, training: Training, facts: ModelFacts, tokens: int, parts: int) -> int:
    """Of one rank, where weights are cut into so many parts."""
    width = 2 if training.precision == "bfloat16" else 4
    if parameters.lora is not None:
        lora = parameters.lora
        trainable = lora_parameters(lora.rank, lora.targets, facts) + whole_parameters(
            lora.modules_to_save or [], facts
        )
        # Four bits and the scale of every 64 weights.
        frozen = facts.parameters * width if lora.quantization is None else round(facts.parameters * 0.56)
        weights, held = frozen / parts + 16 * trainable, 0.0
    else:
        # Penalties hold a copy of the start.
        weights, held = 16 * facts.parameters / parts, 4 * facts.parameters / parts
    if parts > 1:
        weights += _put_together(parameters, training, facts, width)
    if training.l2sp is not None:
        weights += held
    if getattr(parameters, "ewc", None) is not None:
        weights += held + 4 * facts.parameters
    layer = _activations_per_layer(facts)
    per_token = facts.hidden * facts.layers + layer if training.gradient_checkpointing else layer * facts.layers
    return round(RUNTIME_BYTES + weights + tokens * per_token * width)


def _put_together(parameters: TunedStage, training: Training, facts: ModelFacts, width: int) -> float:
    """Bytes that sharded weights take while they compute."""
    around = facts.vocabulary * facts.hidden
    open_ = around + 2 * max(facts.parameters - around, 0) / facts.layers
    if parameters.lora is not None:
        return open_ * width
    # Float32 weights and their gradients before they are summed over ranks.
    found = 8 * open_
    if width == 2 and not training.gradient_checkpointing:
        found += 2 * facts.parameters  # Autograd keeps the casts of all layers until the backward pass.
    return found


def _activations_per_layer(facts: ModelFacts) -> int:
    projections = (2 * facts.heads + 2 * facts.key_value_heads) * facts.head_size
    return 10 * facts.hidden + projections + 3 * facts.intermediate


def _inference_memory(stage: StageRecord, facts: ModelFacts) -> int:
    if stage.type == "merge":
        # The merged weights in their stored type, one matrix at a time in float64.
        stored = 2 if facts.storage_dtype == "bfloat16" else 4
        if "method" in stage.parameters:
            # One model, and of the embeddings every model's copy, the result and TIES' changes in float64.
            largest = facts.vocabulary * facts.hidden
            return round(
                RUNTIME_BYTES + facts.parameters * stored + largest * (stored * (len(stage.inputs) + 1) + 2 * 8)
            )
        return round(
            RUNTIME_BYTES + facts.parameters * stored + 3 * 8 * facts.hidden * max(facts.intermediate, facts.hidden)
        )
    evaluate = _evaluate(stage.parameters)
    width = 2 if evaluate.precision == "bfloat16" else 4
    per_token = 2 * _activations_per_layer(facts)
    return round(RUNTIME_BYTES + facts.parameters * width + evaluate.tokens_per_batch * per_token * width)


def _evaluate(parameters: dict[str, Any]) -> Evaluate:
    return Evaluate.model_validate({key: value for key, value in parameters.items() if key != "seed"})


def shown_bytes(count: int) -> str:
    """Such as `1.6 GiB`."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
