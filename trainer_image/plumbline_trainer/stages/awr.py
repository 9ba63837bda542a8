"""Advantage-weighted regression: offline RL on logged answers with scores, the better ones imitated more."""

from __future__ import annotations

import dataclasses

from plumbline_api.methods import Awr

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.data.encode import encode_rows
from plumbline_trainer.data.loading import load_scored_rows
from plumbline_trainer.engine.distributed import joined_ranks
from plumbline_trainer.engine.preference_run import PreferenceRows, open_run
from plumbline_trainer.engine.recomputation import recomputes
from plumbline_trainer.engine.reference_pass import kl_reference
from plumbline_trainer.engine.scorer import prepare_modes
from plumbline_trainer.engine.trained import load_start, report_rows, save_policy, stage_parameters
from plumbline_trainer.engine.weighted import WeightedAnswers, weigh_answers


def run(context: StageContext) -> StageOutput | None:
    """Train on all answers of each row; the loss is a weighted mean over their tokens. Nothing is dropped at random."""
    parameters, seed = stage_parameters(context, Awr)
    with joined_ranks(context.rank, context.world_size, context.device) as ranks:
        # Load
        policy = load_start(context, parameters)
        dataset, longest = context.input("dataset"), parameters.training.max_length
        encoded, held_out = (
            encode_rows(
                load_scored_rows(context, dataset, split), policy.tokenizer, method="ranked", max_length=longest
            )
            for split in ("train", "evaluation")
        )
        report_rows(context, encoded, "training rows")
        weighed = weigh_answers(encoded.rows, held_out.rows, parameters)
        context.log.info("weights: %s", ", ".join(f"{name} {value:.4g}" for name, value in weighed.figures.items()))

        # Build
        rows = PreferenceRows(dataclasses.replace(encoded, rows=weighed.rows), weighed.held_out)
        run = open_run(context, ranks, policy, parameters, rows, seed)
        run.resume()
        reference = kl_reference(run, policy)
        prepare_modes(run.scorer, adapter_dropout=False, gradient_checkpointing=recomputes(run, reference))

        # Loop
        run.train(
            WeightedAnswers(clip=parameters.weight_clip),
            weighed.held_out,
            kl=parameters.kl_coefficient,
            kl_reference=reference,
            rehearsal=parameters.rehearsed_weight,
        )

        # Save and report
        output = save_policy(context, run, policy, parameters.lora, encoded)
        return None if output is None else dataclasses.replace(output, metrics=output.metrics | weighed.figures)
