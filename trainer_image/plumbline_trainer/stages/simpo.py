"""Simple preference optimisation: chosen answers likelier per token by a margin, no reference."""

from __future__ import annotations

from plumbline_api.methods import Simpo

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.engine.distributed import joined_ranks
from plumbline_trainer.engine.preference import simpo_objective
from plumbline_trainer.engine.preference_run import load_preferences, open_run
from plumbline_trainer.engine.recomputation import recomputes
from plumbline_trainer.engine.reference_pass import kl_reference
from plumbline_trainer.engine.scorer import prepare_modes
from plumbline_trainer.engine.trained import load_start, save_policy, stage_parameters


def run(context: StageContext) -> StageOutput | None:
    """Train on pairs; the loss is the mean over the pairs of a step. Nothing is dropped at random."""
    parameters, seed = stage_parameters(context, Simpo)
    with joined_ranks(context.rank, context.world_size, context.device) as ranks:
        # Load
        policy = load_start(context, parameters)
        rows = load_preferences(context, policy, parameters)

        # Build
        run = open_run(context, ranks, policy, parameters, rows, seed)
        run.resume()
        reference = kl_reference(run, policy)
        prepare_modes(run.scorer, adapter_dropout=False, gradient_checkpointing=recomputes(run, reference))

        # Loop
        run.train(
            simpo_objective(parameters),
            rows.held_out,
            kl=parameters.kl_coefficient,
            kl_reference=reference,
            rehearsal=parameters.rehearsed_weight,
        )

        # Save and report
        return save_policy(context, run, policy, parameters.lora, rows.encoded)
