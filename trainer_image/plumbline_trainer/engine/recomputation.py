"""Whether a stage keeps activations for the backward pass or computes them again: only memory decides."""

from __future__ import annotations

import torch

from plumbline_trainer.cgroups import memory_limit
from plumbline_trainer.context import StageContext
from plumbline_trainer.engine.layers import layer_depths
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.packing import packed_length
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.errors import InputError
from plumbline_trainer.planning.memory import Weights, fits, shown_bytes, sizes_of, training_memory


def recomputes(run: TrainingRun, beside: Scorer | None = None) -> bool:
    """As `training.gradientCheckpointing` says; where it says nothing, whether the rest would not leave room for them.

    No result depends on it. Every rank decides alike. Call it once penalties are added.

    Args:
        run: Of the stage.
        beside: Another model that stays in memory.
    """
    said = run.training.gradient_checkpointing
    if said is not None:
        return said
    limit = memory_of_this_rank(run.context)
    need = estimated(run, beside)
    has = "unknown" if limit is None else shown_bytes(limit)
    if run.ranks.any(not fits(need, limit)):
        if run.scorer.model.supports_gradient_checkpointing:
            run.context.log.info(
                "activations are computed again in the backward pass: with them the stage would take about %s of %s; "
                "a smaller training.tokensPerBatch keeps them",
                shown_bytes(need),
                has,
            )
            return True
        run.context.log.warning(
            "the stage may take about %s of %s, and %s cannot compute activations again; lower training.tokensPerBatch",
            shown_bytes(need),
            has,
            type(run.scorer.model).__name__,
        )
        return False
    run.context.log.info("activations are kept: the stage takes about %s; memory: %s", shown_bytes(need), has)
    return False


def memory_of_this_rank(context: StageContext) -> int | None:
    """Bytes: of its accelerator, or its share of the memory that the ranks of this node may use; None if unknown."""
    if context.device.type == "cuda":
        return int(torch.cuda.get_device_properties(context.device).total_memory)
    limit = memory_limit()
    return None if limit is None else limit // max(1, context.world_size // max(1, context.run.nodes))


def estimated(run: TrainingRun, beside: Scorer | None = None) -> int:
    """Bytes of this rank if activations are kept."""
    model, training = run.scorer.model, run.training
    trained = sum(parameter.numel() for parameter in run.trainables.values())
    models = [model] if beside is None else [model, beside.model]
    frozen = sum(
        parameter.numel() * parameter.element_size()
        for one in models
        for parameter in one.parameters()
        if not parameter.requires_grad
    )
    whole = sum(parameter.numel() for parameter in model.parameters())
    # A copy of where trained weights started; with adapters there is none.
    copies = 0 if any(".lora_" in name for name in run.trainables) else 4 * trained
    held = {"l2sp": copies, "ewc": copies + 4 * whole}
    return training_memory(
        sizes_of(model.config.get_text_config()),
        Weights(
            frozen=frozen,
            trained=trained,
            blocks=_learning_blocks(run),
            held=sum(held.get(penalty.name, 0) for penalty in run.penalties),
        ),
        tokens=largest_batch(
            [packed_length(row) for row in run.rows], training.tokens_per_batch, training.global_batch
        ),
        width=2 if run.scorer.precision == "bfloat16" else 4,
        recomputed=False,
    )


def largest_batch(lengths: list[int], budget: int, global_batch: int) -> int:
    """Most tokens that a micro-batch can have: it is part of a step, and a row longer than the budget stands alone."""
    longest = sorted(lengths, reverse=True)[:global_batch]
    return max(longest[0], min(budget, sum(longest)))


def _learning_blocks(run: TrainingRun) -> int:
    """Blocks from the lowest in which something learns to the top."""
    model = run.scorer.model
    count = int(model.config.get_text_config().num_hidden_layers)
    try:
        depths = layer_depths(model)
    except InputError:  # a model without a list of layers
        return count
    return min(count, 1 + max(depths.get(name, 0) for name in run.trainables))
