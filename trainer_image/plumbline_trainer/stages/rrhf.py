"""Rank responses: likelihoods per token in the order of the ranks, and the best response imitated, no reference."""

from __future__ import annotations

from plumbline_api.methods import Rrhf

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.engine.distributed import joined_ranks
from plumbline_trainer.engine.preference import RankedResponses
from plumbline_trainer.engine.preference_run import load_preferences, open_run
from plumbline_trainer.engine.recomputation import recomputes
from plumbline_trainer.engine.reference_pass import kl_reference
from plumbline_trainer.engine.scorer import prepare_modes
from plumbline_trainer.engine.trained import load_start, save_policy, stage_parameters


def run(context: StageContext) -> StageOutput | None:
    """Train on ranked responses; the loss is the mean over the rows of a step. Nothing is dropped at random."""
    parameters, seed = stage_parameters(context, Rrhf)
    with joined_ranks(context.rank, context.world_size, context.device) as ranks:
        # Load
        policy = load_start(context, parameters)
        rows = load_preferences(context, policy, parameters, "ranked")

        # Build
        run = open_run(context, ranks, policy, parameters, rows, seed)
        run.resume()
        reference = kl_reference(run, policy)
        prepare_modes(run.scorer, adapter_dropout=False, gradient_checkpointing=recomputes(run, reference))

        # Loop
        run.train(
            RankedResponses(sft_weight=parameters.sft_weight),
            rows.held_out,
            kl=parameters.kl_coefficient,
            kl_reference=reference,
            rehearsal=parameters.rehearsed_weight,
        )

        # Save and report
        return save_policy(context, run, policy, parameters.lora, rows.encoded)
