"""REINFORCE with a leave-one-out baseline: whole answers against the mean of the others to their prompt."""

from __future__ import annotations

import torch
from plumbline_api.online import Rloo

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.engine.distributed import joined_ranks
from plumbline_trainer.engine.online_run import kl_controller, make_learner, open_run, save_learner
from plumbline_trainer.engine.policy_gradient import PolicyObjective
from plumbline_trainer.engine.prompts import load_prompts
from plumbline_trainer.engine.trained import load_start, report_rows, stage_parameters
from plumbline_trainer.losses.advantages import leave_one_out
from plumbline_trainer.losses.kl import kl_estimate


def run(context: StageContext) -> StageOutput | None:
    """Learn from the rewards of sampled answers; KL is taken off the reward of each. Nothing is dropped at random."""
    parameters, seed = stage_parameters(context, Rloo)
    with joined_ranks(context.rank, context.world_size, context.device) as ranks:
        # Load
        policy = load_start(context, parameters)
        prompts = load_prompts(context, policy, parameters)
        report_rows(context, prompts.encoded, "training prompts")

        # Build
        scorer, reference = make_learner(context, policy, parameters, seed)
        run = open_run(context, ranks, policy, scorer, reference, None, prompts, parameters, seed)
        kl = kl_controller(parameters.kl)
        run.resume(kl=kl)

        # Loop
        for experience in run.rollouts():
            divergences = experience.sums(kl_estimate(experience.old, experience.reference, parameters.kl.estimator))
            rewards = experience.shaped - kl.coefficient * divergences
            figures = run.learn(
                experience,
                PolicyObjective(
                    experience,
                    torch.cat([leave_one_out(group) for group in torch.split(rewards, parameters.answers)]),
                    clip_low=parameters.clip,
                    clip_high=parameters.clip,
                    whole_answers=True,
                    entropy_coefficient=parameters.entropy_coefficient,
                ),
            )
            figures |= {"klCoefficient": kl.coefficient}
            kl.update(float(divergences.mean()), len(experience.answers))
            run.close(figures)

        # Save and report
        return save_learner(context, run, policy, parameters, prompts)
