"""Kahneman-Tversky optimisation: make desirable answers likelier and undesirable ones less so, against a reference."""

from __future__ import annotations

from functools import partial

from plumbline_api.methods import Kto

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.data.labels import count_labels
from plumbline_trainer.engine.distributed import joined_ranks
from plumbline_trainer.engine.preference_run import load_preferences, open_run
from plumbline_trainer.engine.recomputation import recomputes
from plumbline_trainer.engine.reference_pass import find_references
from plumbline_trainer.engine.schedule import epoch_order
from plumbline_trainer.engine.scorer import prepare_modes
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.engine.trained import (
    load_start,
    save_policy,
    stage_parameters,
)
from plumbline_trainer.engine.unpaired import DesirableAnswers, mismatched_rows
from plumbline_trainer.errors import InputError


def run(context: StageContext) -> StageOutput | None:
    """Train on labelled answers or pairs; the loss is the mean over the answers of a step.

    Nothing is dropped at random.
    """
    parameters, seed = stage_parameters(context, Kto)
    training = parameters.training
    with joined_ranks(context.rank, context.world_size, context.device) as ranks:
        # Load
        policy = load_start(context, parameters)
        rows = load_preferences(context, policy, parameters, "unpaired")
        encoded, dataset = rows.encoded, context.input("dataset").name
        # In an order of their own, so that neighbours in a file, often of one prompt, are no mismatched pair.
        order = epoch_order(tuple(row.row_id for row in rows.held_out), seed, 0)
        held_out = [rows.held_out[index] for index in order]
        labels = count_labels(response.role for row in encoded.rows for response in row.responses)
        if (fault := labels.one_sided) is not None:
            raise InputError(f'"{dataset}" {fault}')
        if (advice := labels.advice(parameters)) is not None:
            context.log.warning("%s", advice)
        for some, split in ((encoded.rows, "train"), (held_out, "evaluation")):
            if len(some) == 1:
                raise InputError(
                    f'"{dataset}" has one usable row in its {split} split; kto compares rows with each other. '
                    "Add rows, or change datasets[].split"
                )

        # Build
        run = open_run(context, ranks, policy, parameters, rows, seed)
        # The run's own plan: a range test takes other steps than the epochs say.
        steps = [[encoded.rows[index] for index in run.plan.own_rows(step)] for step in range(run.plan.steps)]
        longest = training.max_length
        mismatched = [row for some in (*steps, held_out) if some for row in mismatched_rows(some, longest)]
        # The model's weights are still those it starts from: only now does a resumed run take up its own.
        references = find_references(run, policy, held_out, mismatched)
        run.resume()
        prepare_modes(run.scorer, adapter_dropout=False, gradient_checkpointing=recomputes(run))

        # Loop
        score = partial(
            score_rows,
            run.scorer,
            tokens_per_batch=training.token_budget,
            device=ranks.device,
            precision=training.precision,
            ranks=ranks,
        )
        run.train(DesirableAnswers(references, score, parameters), held_out, rehearsal=parameters.rehearsed_weight)

        # Save and report
        return save_policy(context, run, policy, parameters.lora, encoded)
