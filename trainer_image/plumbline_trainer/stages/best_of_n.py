"""Best of n (rejection sampling): the policy answers each prompt n times and learns what scored best."""

from __future__ import annotations

import time

from plumbline_api.online import BestOfN

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.engine.distributed import joined_ranks
from plumbline_trainer.engine.objective import TokenLikelihood
from plumbline_trainer.engine.preference_run import PreferenceRows, open_run
from plumbline_trainer.engine.prompts import load_prompts
from plumbline_trainer.engine.recomputation import recomputes
from plumbline_trainer.engine.rejection import encode_winners, find_answers, with_answers
from plumbline_trainer.engine.scorer import prepare_modes
from plumbline_trainer.engine.trained import report_rows, save_policy, stage_parameters, weights_precision
from plumbline_trainer.models.policy import load_policy


def run(context: StageContext) -> StageOutput | None:
    """Train on the winners; the loss is that of `sft`, a mean over their tokens. Nothing is dropped at random."""
    parameters, seed = stage_parameters(context, BestOfN)
    training = parameters.training
    with joined_ranks(context.rank, context.world_size, context.device) as ranks:
        # Load
        # On its device also where it will be held in four bits: it answers before it is trained.
        policy = load_policy(
            context, context.input("model"), precision=weights_precision(parameters), device=context.device
        )
        prompts = load_prompts(context, policy, parameters)
        report_rows(context, prompts.encoded, "training prompts")

        # Sample and score
        answers = find_answers(context, ranks, policy, prompts, parameters, seed)
        encoded, held_out = encode_winners(answers, policy.tokenizer, training.max_length)
        report_rows(context, encoded, "winners")

        # Build
        run = open_run(context, ranks, policy, parameters, PreferenceRows(encoded, held_out), seed)
        run.resume()
        prepare_modes(run.scorer, adapter_dropout=False, gradient_checkpointing=recomputes(run))

        # Loop
        started = time.monotonic()
        run.train(TokenLikelihood(), held_out)

        # Save and report
        output = save_policy(context, run, policy, parameters.lora, encoded)
        return None if output is None else with_answers(output, answers, time.monotonic() - started)
