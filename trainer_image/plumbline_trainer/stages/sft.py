"""Supervised fine-tuning: imitate answers."""

from __future__ import annotations

from plumbline_api.methods import Sft

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.data.encode import encode_rows
from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.data.rehearsal import load_rehearsal
from plumbline_trainer.engine.distributed import joined_ranks
from plumbline_trainer.engine.fisher import hold_weights
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.objective import TokenLikelihood
from plumbline_trainer.engine.recomputation import recomputes
from plumbline_trainer.engine.reference_pass import kl_reference
from plumbline_trainer.engine.schedule import plan_steps
from plumbline_trainer.engine.scorer import Scorer, prepare_modes
from plumbline_trainer.engine.trained import (
    load_start,
    make_trainable,
    report_rows,
    save_policy,
    stage_parameters,
)


def run(context: StageContext) -> StageOutput | None:
    """Train on the tokens that `lossOn` names; the loss is the mean over such tokens of a step."""
    parameters, seed = stage_parameters(context, Sft)
    training, lora = parameters.training, parameters.lora
    with joined_ranks(context.rank, context.world_size, context.device) as ranks:
        # Load
        policy = load_start(context, parameters)
        dataset, method, longest = context.input("dataset"), parameters.loss_on, training.max_length
        encoded = encode_rows(load_rows(context, dataset, "train"), policy.tokenizer, method=method, max_length=longest)
        held_out = encode_rows(
            load_rows(context, dataset, "evaluation"), policy.tokenizer, method=method, max_length=longest
        ).rows
        rehearsal = load_rehearsal(context, parameters, policy.tokenizer, method=method)
        report_rows(context, encoded, "training rows")
        for other in rehearsal.datasets:
            report_rows(context, other, "rehearsal rows")

        # Build
        scorer = Scorer(make_trainable(policy, lora, seed, freeze=parameters.freeze), precision=training.precision)
        plan = plan_steps(
            [row.row_id for row in encoded.rows],
            seed=seed,
            global_batch=training.global_batch,
            epochs=training.epochs,
            max_steps=training.max_steps,
            rehearsal=rehearsal.plan,
        )
        run = TrainingRun(context, ranks, scorer, plan, rehearsal.behind(encoded.rows), training)
        # The model's weights are still those it starts from: only now does a resumed run take up its own.
        hold_weights(run, policy, parameters, seed, method=method)
        run.resume()
        reference = kl_reference(run, policy)
        prepare_modes(
            scorer,
            adapter_dropout=lora is not None and lora.dropout > 0,
            gradient_checkpointing=recomputes(run, reference),
        )

        # Loop
        run.train(
            TokenLikelihood(),
            held_out,
            label_smoothing=parameters.label_smoothing or 0.0,
            kl=parameters.kl_coefficient,
            kl_reference=reference,
        )

        # Save and report
        return save_policy(context, run, policy, lora, encoded)
