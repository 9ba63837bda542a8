"""Whether a stage keeps activations for the backward pass or computes them again: only memory decides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from plumbline_api.training import Training

from plumbline_trainer.cgroups import memory_limit
from plumbline_trainer.context import StageContext
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.layers import layer_depths
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.packing import packed_length
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.sharding import own_part
from plumbline_trainer.errors import InputError
from plumbline_trainer.planning.memory import Weights, fits, shown_bytes, sizes_of, training_memory


def recomputes(run: TrainingRun, beside: Scorer | None = None) -> bool:
    """`computes_again` for a run over given rows. Call it once penalties are added.

    Args:
        run: Of the stage.
        beside: Another model that stays in memory.
    """
    lengths = [packed_length(row) for row in run.rows]
    return computes_again(
        run.context,
        run.ranks,
        run.scorer,
        run.training,
        tokens=largest_batch(lengths, run.training.token_budget, run.training.global_batch),
        penalties=[penalty.name for penalty in run.penalties],
        beside=[] if beside is None else [beside],
    )


def computes_again(
    context: StageContext,
    ranks: Ranks,
    scorer: Scorer,
    training: Training,
    *,
    tokens: int,
    penalties: Sequence[str] = (),
    beside: Sequence[Scorer] = (),
) -> bool:
    """As `training.gradientCheckpointing` says; where it says nothing, whether the rest would not leave room for them.

    No result depends on it. Every rank decides alike.

    Args:
        context: Of the stage.
        ranks: Processes that share the work.
        scorer: Around the model that is trained.
        training: Optimisation parameters.
        tokens: Most tokens of a micro-batch.
        penalties: Names of what holds weights.
        beside: Other models that stay in memory.
    """
    said = training.gradient_checkpointing
    if said is not None:
        return said
    limit = memory_of_this_rank(context)
    need = estimated(scorer, tokens, penalties, beside)
    has = "unknown" if limit is None else shown_bytes(limit)
    if not ranks.any(not fits(need, limit)):
        context.log.info("activations are kept: the stage takes about %s; memory: %s", shown_bytes(need), has)
        return False
    if scorer.model.supports_gradient_checkpointing:
        context.log.info(
            "activations are computed again in the backward pass: with them the stage would take about %s of %s; "
            "a smaller training.tokensPerBatch keeps them",
            shown_bytes(need),
            has,
        )
        return True
    context.log.warning(
        "the stage may take about %s of %s, and %s cannot compute activations again; lower training.tokensPerBatch",
        shown_bytes(need),
        has,
        type(scorer.model).__name__,
    )
    return False


def memory_of_this_rank(context: StageContext) -> int | None:
    """Bytes: of its accelerator, or its share of the memory that the ranks of this node may use; None if unknown."""
    if context.device.type == "cuda":
        return int(torch.cuda.get_device_properties(context.device).total_memory)
    limit = memory_limit()
    return None if limit is None else limit // max(1, context.world_size // max(1, context.run.nodes))


def estimated(scorer: Scorer, tokens: int, penalties: Sequence[str], beside: Sequence[Scorer]) -> int:
    """Bytes of this rank if activations are kept; the other arguments as for `computes_again`."""
    trainables = scorer.trainables()
    trained = sum(own_part(parameter).numel() for parameter in trainables.values())
    own = {id(parameter) for parameter in scorer.parameters()}
    others = [parameter for one in beside for parameter in one.parameters() if id(parameter) not in own]
    trained += sum(parameter.numel() for parameter in others if parameter.requires_grad)  # a critic learns as well
    frozen = sum(
        own_part(parameter).numel() * parameter.element_size()
        for parameter in [*scorer.parameters(), *others]
        if not parameter.requires_grad
    )
    # A copy of where trained weights started; with adapters there is none.
    copies = 0 if any(".lora_" in name for name in trainables) else 4 * trained
    weights = sum(own_part(parameter).numel() for parameter in scorer.model.parameters())
    held = {"l2sp": copies, "ewc": copies + 4 * weights}
    return training_memory(
        sizes_of(scorer.model.config.get_text_config()),
        Weights(
            frozen=frozen,
            trained=trained,
            blocks=_learning_blocks(scorer),
            held=sum(held.get(name, 0) for name in penalties),
        ),
        tokens=tokens,
        width=2 if scorer.precision == "bfloat16" else 4,
        recomputed=False,
    )


def largest_batch(lengths: list[int], budget: int, global_batch: int) -> int:
    """Most tokens that a micro-batch can have: it is part of a step, and a row longer than the budget stands alone."""
    longest = sorted(lengths, reverse=True)[:global_batch]
    return max(longest[0], min(budget, sum(longest)))


def _learning_blocks(scorer: Scorer) -> int:
    """Blocks from the lowest in which something learns to the top."""
    model = scorer.model
    count = int(model.config.get_text_config().num_hidden_layers)
    try:
        depths = layer_depths(model)
    except InputError:  # a model without a list of layers
        return count
    return min(count, 1 + max(depths.get(name, 0) for name in scorer.trainables()))
