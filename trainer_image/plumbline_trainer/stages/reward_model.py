"""Reward model: a scalar head on the policy learns which of several answers is better."""

from __future__ import annotations

from plumbline_api.methods import RewardModel
from transformers import PreTrainedModel

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.engine.distributed import joined_ranks
from plumbline_trainer.engine.preference_run import PreferenceRows, load_training_rows, open_run
from plumbline_trainer.engine.ranking import RewardRanking
from plumbline_trainer.engine.recomputation import recomputes
from plumbline_trainer.engine.reward_pass import (
    as_read_back,
    encode_held_out,
    measure_held_out,
    reward_config,
    round_as_stored,
    save_reward,
)
from plumbline_trainer.engine.scorer import prepare_modes
from plumbline_trainer.engine.trained import (
    load_start,
    save_range_test,
    stage_parameters,
)
from plumbline_trainer.engine.values import ValueScorer, fresh_heads
from plumbline_trainer.models.selection import module_names, refuse_unread_head


def run(context: StageContext) -> StageOutput | None:
    """Train on rows of two or more answers; the loss is the mean over rows. Nothing is dropped at random."""
    parameters, seed = stage_parameters(context, RewardModel)
    training, lora = parameters.training, parameters.lora

    def with_heads(model: PreTrainedModel) -> ValueScorer:
        return ValueScorer(model, fresh_heads(model, parameters.heads, seed), precision=training.precision)

    with joined_ranks(context.rank, context.world_size, context.device) as ranks:
        # Load
        policy = load_start(context, parameters)
        encoded = load_training_rows(context, policy, parameters, "score")
        held_out = encode_held_out(context, context.input("dataset"), policy, training.max_length)

        # Build
        refuse_unread_head(module_names(policy.model), lora)
        rows = PreferenceRows(encoded, held_out["evaluation"].rows)
        run = open_run(context, ranks, policy, parameters, rows, seed, wrap=with_heads)
        run.resume()
        prepare_modes(run.scorer, adapter_dropout=False, gradient_checkpointing=recomputes(run))

        # Loop
        run.train(RewardRanking(centring=parameters.centring), rows.held_out)
        if training.range_test is not None:
            return save_range_test(context, run) if ranks.is_main else None

        # Measure
        round_as_stored(policy, lora)
        reader = as_read_back(run, policy, lora)
        config = reward_config(run, reader, parameters)
        measured = measure_held_out(run, reader, held_out)

        # Save and report
        return save_reward(context, run, policy, config, encoded, measured)
