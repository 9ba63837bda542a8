"""REINFORCE++: rewards to go with KL per token, whitened over the rollout, without a critic."""

from __future__ import annotations

import torch
from plumbline_api.online import Reinforce

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.engine.distributed import joined_ranks
from plumbline_trainer.engine.online_run import kl_controller, make_learner, open_run, save_learner
from plumbline_trainer.engine.policy_gradient import PolicyObjective
from plumbline_trainer.engine.prompts import load_prompts
from plumbline_trainer.engine.trained import load_start, report_rows, stage_parameters
from plumbline_trainer.losses.advantages import discounted_sums, group_advantages, token_rewards, whiten
from plumbline_trainer.losses.kl import kl_estimate


def run(context: StageContext) -> StageOutput | None:
    """Learn from the rewards of sampled answers. Nothing is dropped at random."""
    parameters, seed = stage_parameters(context, Reinforce)
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
            if parameters.baseline == "group":
                scores = torch.cat(
                    [group_advantages(group, scale="none") for group in torch.split(scores, parameters.answers)]
                )
            divergences = kl_estimate(experience.old, experience.reference, parameters.kl.estimator)
            returns = [
                discounted_sums(token_rewards(divergence, float(score), kl.coefficient), parameters.gamma)
                for divergence, score in zip(experience.by_answer(divergences), scores, strict=True)
            ]
            figures = run.learn(
                experience,
                PolicyObjective(
                    experience,
                    whiten(torch.cat(returns)),
                    clip_low=parameters.clip,
                    clip_high=parameters.clip,
                    entropy_coefficient=parameters.entropy_coefficient,
                ),
            )
            figures |= {"klCoefficient": kl.coefficient}
            kl.update(float(experience.sums(divergences).mean()), len(experience.answers))
            run.close(figures)

        # Save and report
        return save_learner(context, run, policy, parameters, prompts)
