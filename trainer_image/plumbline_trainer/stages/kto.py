"""Kahneman-Tversky optimisation: make desirable answers likelier and undesirable ones less so, against a reference."""

from __future__ import annotations

from functools import partial

from plumbline_api.methods import Kto

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.data.encode import encode_rows
from plumbline_trainer.data.labels import count_labels
from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.engine.distributed import joined_ranks
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.reference_pass import find_references
from plumbline_trainer.engine.schedule import epoch_order, plan_steps
from plumbline_trainer.engine.scorer import Scorer, prepare_modes
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.engine.trained import (
    load_start,
    make_trainable,
    report_rows,
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
    training, lora = parameters.training, parameters.lora
    with joined_ranks(context.rank, context.world_size, context.device) as ranks:
        # Load
        policy = load_start(context, parameters)
        dataset, longest = context.input("dataset"), training.max_length
        encoded = encode_rows(
            load_rows(context, dataset, "train"), policy.tokenizer, method="unpaired", max_length=longest
        )
        held_out = encode_rows(
            load_rows(context, dataset, "evaluation"), policy.tokenizer, method="unpaired", max_length=longest
        ).rows
        # In an order of their own, so that neighbours in a file, often of one prompt, are no mismatched pair.
        held_out = [held_out[index] for index in epoch_order(tuple(row.row_id for row in held_out), seed, 0)]
        report_rows(context, encoded, "training rows")
        labels = count_labels(response.role for row in encoded.rows for response in row.responses)
        if (fault := labels.one_sided) is not None:
            raise InputError(f'"{dataset.name}" {fault}')
        if (advice := labels.advice(parameters)) is not None:
            context.log.warning("%s", advice)
        for rows, split in ((encoded.rows, "train"), (held_out, "evaluation")):
            if len(rows) == 1:
                raise InputError(
                    f'"{dataset.name}" has one usable row in its {split} split; kto compares rows with each other. '
                    "Add rows, or change datasets[].split"
                )

        # Build
        scorer = Scorer(make_trainable(policy, lora, seed, freeze=parameters.freeze), precision=training.precision)
        plan = plan_steps(
            [row.row_id for row in encoded.rows],
            seed=seed,
            global_batch=training.global_batch,
            epochs=training.epochs,
            max_steps=training.max_steps,
            least=Kto.least_rows,
        )
        run = TrainingRun(context, ranks, scorer, plan, encoded.rows, training)
        # The run's own plan: a range test takes other steps than the epochs say.
        steps = [[encoded.rows[index] for index in run.plan.rows(step)] for step in range(run.plan.steps)]
        mismatched = [row for rows in (*steps, held_out) if rows for row in mismatched_rows(rows, longest)]
        # The model's weights are still those it starts from: only now does a resumed run take up its own.
        references = find_references(run, policy, held_out, mismatched)
        run.resume()
        prepare_modes(scorer, adapter_dropout=False, gradient_checkpointing=training.gradient_checkpointing)

        # Loop
        score = partial(
            score_rows,
            scorer,
            tokens_per_batch=training.tokens_per_batch,
            device=ranks.device,
            precision=training.precision,
            ranks=ranks,
        )
        run.train(DesirableAnswers(references, score, parameters), held_out)

        # Save and report
        return save_policy(context, run, policy, lora, encoded)
