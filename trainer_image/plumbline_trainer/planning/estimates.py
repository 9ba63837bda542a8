"""What a stage will take: steps, tokens, memory and accelerator time. Estimates, and named so.

Tokens are those that go through the model in training: of a row with several answers the prompt counts once, because
the answers share it. What a frozen reference reads, once for all epochs, does not count. Memory is that of `memory`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from plumbline_api.evaluation import Evaluate
from plumbline_api.methods import TRAINING_STAGES, Kl
from plumbline_api.online import ONLINE_STAGES, OnlineStage, Ppo
from plumbline_api.record import StageRecord, own_parameters
from plumbline_api.training import TunedStage

from plumbline_trainer.engine.schedule import plan_steps
from plumbline_trainer.models.dtypes import holds_stored
from plumbline_trainer.models.selection import ModuleNames, trained_parts
from plumbline_trainer.planning.datasets import SplitFindings
from plumbline_trainer.planning.facts import ModelFacts
from plumbline_trainer.planning.memory import RUNTIME_BYTES, Weights, activations_per_block, fits, training_memory
from plumbline_trainer.planning.sampling import beside_policy, tokens_per_prompt

ONE_ANSWER = frozenset({"pretrain", "sft"})
EVERY_ANSWER = frozenset({"rewardModel", "rrhf", "awr"})
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
    names: ModuleNames | None = None,
    limit: int | None = None,
) -> Estimate:
    """Estimate one stage.

    Args:
        stage: its record.
        facts: of the base model.
        rows: its training rows; None for stages that do not train.
        tokens_per_second: training tokens per second and accelerator at 1B parameters; None if nobody says.
        rehearsed: training rows of the datasets that are mixed in, as declared.
        names: the modules of the model; needed where a stage trains a part of it.
        limit: bytes of memory that a rank may use; None if nobody says.
    """
    if stage.type not in TRAINING_STAGES:
        return Estimate(memory=_inference_memory(stage, facts))
    model = TRAINING_STAGES[stage.type]
    parameters = model.model_validate(own_parameters(stage.parameters))
    training, device = parameters.training, "cuda" if stage.resources.gpus_per_node else "cpu"
    if isinstance(parameters, OnlineStage):
        training_memory_of = partial(_training_memory, parameters, facts, names=names, limit=limit, device=device)
        return _online(stage, parameters, facts, rows, tokens_per_second, training_memory_of)
    steps = tokens = gpu_hours = None
    if rows is not None and rows.rows:
        shares = [item.share for item in getattr(parameters, "rehearsal", None) or ()]
        plan = plan_steps(
            # At most so many winners of each prompt are trained on.
            _names(rows, training.max_length, getattr(parameters, "keep", 1)),
            seed=0,
            global_batch=training.global_batch,
            epochs=training.epochs,
            max_steps=training.max_steps,
            rehearsal=[
                (_names(other, training.max_length), part) for other, part in zip(rehearsed, shares, strict=True)
            ],
            least=parameters.step_needs,
        )
        steps = plan.steps if training.range_test is None else training.range_test.steps
        taken = steps * training.global_batch
        if training.range_test is None:
            own = rows.sequences(training.max_length)
            taken = min(taken, math.ceil(max(training.epochs, 1 / own) * plan.rows_per_epoch))
        # The mismatched answers that kto takes its reference point from are as long as the others.
        passes = 2 if stage.type == "kto" else 1
        per_row = passes * _mean_tokens(stage, rows, training.max_length) * (1.0 - sum(shares)) + sum(
            share * other.tokens(training.max_length) / other.sequences(training.max_length)
            for other, share in zip(rehearsed, shares, strict=True)
        )
        tokens = round(taken * per_row)
        if tokens_per_second is not None and stage.resources.gpus_per_node:
            rate = tokens_per_second * 1e9 / facts.parameters
            gpu_hours = round(tokens / rate / 3600, 4)
    longest = training.token_budget
    if rows is not None and rows.rows:
        row = _longest_row(stage, rows, training.max_length)
        # A micro-batch is part of a step, and a row longer than the budget stands alone.
        longest = max(row, min(longest, row * training.global_batch))
    memory = _training_memory(parameters, facts, longest, names, limit, _parts(stage, parameters), device=device)
    return Estimate(steps, tokens, memory, gpu_hours)


def can_be_sharded(stage: StageRecord) -> bool:
    """Whether a stage has several ranks to share weights out over, and does not."""
    if stage.type not in TRAINING_STAGES or stage.type in ONLINE_STAGES:
        return False
    return stage.parameters.get("training", {}).get("sharding", "none") == "none" and _ranks(stage) > 1


def _ranks(stage: StageRecord) -> int:
    return stage.resources.nodes * max(stage.resources.gpus_per_node or 1, 1)


def _parts(stage: StageRecord, parameters: TunedStage) -> int:
    return _ranks(stage) if parameters.training.sharding == "full" else 1


def _online(
    stage: StageRecord,
    parameters: OnlineStage,
    facts: ModelFacts,
    rows: SplitFindings | None,
    tokens_per_second: float | None,
    memory: Callable[[int], int],
) -> Estimate:
    """Of a stage that samples; its rows are prompts."""
    training = parameters.training
    steps = tokens = gpu_hours = None
    if rows is not None and rows.prompts:
        plan = plan_steps(
            [str(number) for number in range(rows.rows)],
            seed=0,
            global_batch=training.global_batch,
            epochs=training.epochs,
            max_steps=training.max_steps,
        )
        steps = plan.steps
        prompt = sum(rows.prompts) / len(rows.prompts)
        tokens = round(steps * training.global_batch * tokens_per_prompt(parameters, prompt))
        if tokens_per_second is not None and stage.resources.gpus_per_node:
            gpu_hours = round(tokens / (tokens_per_second * 1e9 / facts.parameters) / 3600, 4)
    longest = max(rows.prompts[-1] if rows is not None and rows.prompts else 0, 1) + parameters.rollout.max_new_tokens
    total = memory(max(longest, training.token_budget)) + beside_policy(parameters, facts)
    if isinstance(parameters, Ppo):
        adapter = (
            0 if parameters.lora is None else lora_parameters(parameters.lora.rank, parameters.lora.targets, facts)
        )
        total += 16 * (adapter or facts.parameters)
    return Estimate(steps, tokens, total, gpu_hours)


def _names(rows: SplitFindings, max_length: int, times: int = 1) -> list[str]:
    return [str(number) for number in range(rows.sequences(max_length) * times)]


def _mean_tokens(stage: StageRecord, rows: SplitFindings, max_length: int) -> float:
    """Tokens of a row that a training stage reads, in the mean."""
    if stage.type == "bestOfN":
        return min(sum(rows.prompts) / len(rows.prompts) + _new_tokens(stage), max_length)
    if stage.type in ONE_ANSWER:
        return rows.tokens(max_length) / rows.sequences(max_length)
    packed = rows.packed(max_length, as_pairs=stage.type not in EVERY_ANSWER)
    return sum(packed) / len(packed)


def _longest_row(stage: StageRecord, rows: SplitFindings, max_length: int) -> int:
    """Tokens of the row that takes the most memory: its answers go through the model together."""
    if stage.type == "bestOfN":
        return min(rows.prompts[-1] + _new_tokens(stage), max_length)
    if stage.type in ONE_ANSWER:
        return min(rows.percentile(100), max_length)
    return max(rows.packed(max_length, as_pairs=stage.type not in EVERY_ANSWER))


def _new_tokens(stage: StageRecord) -> int:
    """Tokens of a sampled answer at its longest."""
    return int(stage.parameters["rollout"]["maxNewTokens"])


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


def _training_memory(
    parameters: TunedStage,
    facts: ModelFacts,
    tokens: int,
    names: ModuleNames | None,
    limit: int | None,
    parts: int = 1,
    *,
    device: str,
) -> int:
    """Of one rank; activations are computed again where the stage says so, or where they would not fit otherwise.

    Where weights are cut into parts, a rank holds one of each, and the embeddings and two blocks whole while they
    compute; adapters and the head of a reference that lies beside the policy are whole on every rank.
    """
    training = parameters.training
    width = 2 if training.precision == "bfloat16" else 4
    stored = parts == 1 and holds_stored(parameters, device=device)
    weights = _weights(parameters, facts, names, stored=stored)
    if parts > 1:
        trained = weights.trained if parameters.lora is not None else weights.trained // parts
        held = weights.held // parts
        if _is_beside(parameters):
            held += facts.vocabulary * facts.hidden * width * (parts - 1) // parts
        weights = replace(weights, frozen=weights.frozen // parts, trained=trained, held=held)
    plain, recomputed = (
        training_memory(facts, weights, tokens=tokens, width=width, recomputed=again)
        + (_put_together(parameters, facts, width, recomputed=again) if parts > 1 else 0)
        for again in (False, True)
    )
    chosen = training.gradient_checkpointing
    needed = recomputed if chosen or (chosen is None and not fits(plain, limit)) else plain
    if parameters.lora is not None and getattr(parameters, "ewc", None) is not None:
        return max(needed, _fisher_memory(parameters, facts, weights, width, parts))
    return needed


def _fisher_memory(parameters: TunedStage, facts: ModelFacts, weights: Weights, width: int, parts: int) -> int:
    """While the Fisher diagonal of frozen weights is taken: their gradients for one row, and activations are kept.

    Without an adapter moments take the place of these gradients, and more, once training begins.
    """
    taken = replace(
        weights,
        frozen=weights.frozen + 4 * weights.trained,
        trained=0,
        held=(4 + width) * facts.parameters // parts,
    )
    row = min(parameters.training.max_length, parameters.training.token_budget)
    needed = training_memory(facts, taken, tokens=row, width=width, recomputed=False)
    # Of what is put together the gradients too, before they are summed over ranks.
    return needed + (2 * _put_together(parameters, facts, width, recomputed=False) if parts > 1 else 0)


def _is_beside(parameters: TunedStage) -> bool:
    """Whether another policy lies in memory as the reference of `kl`."""
    kl = getattr(parameters, "kl", None)
    return isinstance(kl, Kl) and not kl.is_start


def _put_together(parameters: TunedStage, facts: ModelFacts, width: int, *, recomputed: bool) -> int:
    """Bytes that sharded weights take while they compute."""
    around = facts.vocabulary * facts.hidden
    open_ = around + 2 * max(facts.parameters - around, 0) / facts.layers
    if parameters.lora is not None:
        return round(open_ * width)
    # Float32 weights and their gradients before they are summed over ranks; autograd keeps the casts of all layers
    # until the backward pass.
    return round(8 * open_ + (2 * facts.parameters if width == 2 and not recomputed else 0))


def _weights(parameters: TunedStage, facts: ModelFacts, names: ModuleNames | None, *, stored: bool) -> Weights:
    training, lora, ewc = parameters.training, parameters.lora, getattr(parameters, "ewc", None)
    parts = None if names is None else trained_parts(names, lora, parameters.freeze)
    blocks = facts.layers if parts is None or not names or not names.blocks else parts.blocks
    if lora is None:
        trained = facts.parameters if parts is None else min(parts.whole, facts.parameters)
        frozen = 4 * (facts.parameters - trained)
        # Penalties hold a copy of the start.
        copies = 4 * trained
    else:
        width = 2 if training.precision == "bfloat16" else 4
        adapter = lora_parameters(lora.rank, lora.targets, facts)
        trained = adapter if parts is None else round(adapter * parts.adapted) + parts.whole
        # Four bits and the scale of every 64 weights.
        frozen = facts.parameters * width if lora.quantization is None else round(facts.parameters * 0.56)
        if stored and facts.storage_dtype == "bfloat16":
            # All but the embeddings and the head, which may be one with them.
            frozen -= 2 * max(0, facts.parameters - 2 * facts.vocabulary * facts.hidden)
        copies = 0
    held = copies if training.l2sp is not None else 0
    if ewc is not None:
        held += copies + 4 * facts.parameters
    if _is_beside(parameters):
        held += facts.parameters * (2 if training.precision == "bfloat16" else 4)
    return Weights(frozen=frozen, trained=trained, blocks=blocks, held=held)


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
    per_token = 2 * activations_per_block(facts)
    return round(RUNTIME_BYTES + facts.parameters * width + evaluate.tokens_per_batch * per_token * width)


def _evaluate(parameters: dict[str, Any]) -> Evaluate:
    return Evaluate.model_validate(own_parameters(parameters))
