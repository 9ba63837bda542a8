"""Group-relative policy optimisation: each answer against the others to its prompt, without a critic."""

from __future__ import annotations

import torch
from plumbline_api.online import Grpo

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.engine.distributed import joined_ranks
from plumbline_trainer.engine.online_run import kl_controller, make_learner, open_run, save_learner
from plumbline_trainer.engine.policy_gradient import PolicyObjective
from plumbline_trainer.engine.prompts import load_prompts
from plumbline_trainer.engine.trained import load_start, report_rows, stage_parameters
from plumbline_trainer.losses.advantages import group_advantages
from plumbline_trainer.losses.kl import kl_estimate


def run(context: StageContext) -> StageOutput | None:
    """Learn from the rewards of sampled answers; KL is a term of the loss. Nothing is dropped at random."""
    parameters, seed = stage_parameters(context, Grpo)
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
            scores = experience.shaped
            spread = scores.std() if parameters.scale == "batch" else None
            advantages = torch.cat(
                [
                    group_advantages(group, scale=parameters.scale, std=spread)
                    for group in torch.split(scores, parameters.answers)
                ]
            )
            figures = run.learn(
                experience,
                PolicyObjective(
                    experience,
                    experience.spread(advantages),
                    clip_low=parameters.clip,
                    clip_high=parameters.clip if parameters.clip_high is None else parameters.clip_high,
                    loss_over=parameters.loss_over,
                    entropy_coefficient=parameters.entropy_coefficient,
                    kl_coefficient=kl.coefficient,
                    kl_estimator=parameters.kl.estimator,
                ),
            )
            figures |= {"klCoefficient": kl.coefficient} if kl.coefficient else {}
            divergences = kl_estimate(experience.old, experience.reference, parameters.kl.estimator)
            kl.update(float(experience.sums(divergences).mean()), len(experience.answers))
            run.close(figures)

        # Save and report
        return save_learner(context, run, policy, parameters, prompts)
