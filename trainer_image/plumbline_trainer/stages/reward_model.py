"""Reward model: a scalar head on the policy learns which of several answers is better."""

from __future__ import annotations

from plumbline_api.methods import RewardModel

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.data.encode import encode_rows
from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.engine.distributed import joined_ranks
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.ranking import RewardRanking
from plumbline_trainer.engine.reward_pass import (
    encode_held_out,
    measure_held_out,
    reward_config,
    round_as_stored,
    save_reward,
)
from plumbline_trainer.engine.schedule import plan_steps
from plumbline_trainer.engine.scorer import prepare_modes
from plumbline_trainer.engine.trained import (
    load_start,
    make_trainable,
    report_rows,
    save_range_test,
    stage_parameters,
)
from plumbline_trainer.engine.values import ValueScorer, fresh_heads
from plumbline_trainer.models.selection import module_names, refuse_unread_head


def run(context: StageContext) -> StageOutput | None:
    """Train on rows of two or more answers; the loss is the mean over rows. Nothing is dropped at random."""
    parameters, seed = stage_parameters(context, RewardModel)
    training, lora = parameters.training, parameters.lora
    with joined_ranks(context.rank, context.world_size, context.device) as ranks:
        # Load
        policy = load_start(context, parameters)
        dataset, longest = context.input("dataset"), training.max_length
        encoded = encode_rows(
            load_rows(context, dataset, "train"), policy.tokenizer, method="score", max_length=longest
        )
        held_out = encode_held_out(context, dataset, policy, longest)
        report_rows(context, encoded, "training rows")

        # Build
        refuse_unread_head(module_names(policy.model), lora)
        model = make_trainable(policy, lora, seed, freeze=parameters.freeze)
        scorer = ValueScorer(model, fresh_heads(model, parameters.heads, seed), precision=training.precision)
        plan = plan_steps(
            [row.row_id for row in encoded.rows],
            seed=seed,
            global_batch=training.global_batch,
            epochs=training.epochs,
            max_steps=training.max_steps,
        )
        run = TrainingRun(context, ranks, scorer, plan, encoded.rows, training)
        run.resume()
        prepare_modes(scorer, adapter_dropout=False, gradient_checkpointing=training.gradient_checkpointing)

        # Loop
        run.train(RewardRanking(centring=parameters.centring), held_out["evaluation"].rows)
        if training.range_test is not None:
            return save_range_test(context, run) if ranks.is_main else None

        # Measure
        round_as_stored(policy, lora)
        config = reward_config(run, scorer, parameters)
        measured = measure_held_out(run, scorer, held_out)

        # Save and report
        return save_reward(context, run, scorer, policy, config, encoded, measured)
