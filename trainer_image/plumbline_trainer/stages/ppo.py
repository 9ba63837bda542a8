"""Proximal policy optimisation: answer, be scored, and move towards what did better than the critic expected."""

from __future__ import annotations

import torch
from plumbline_api.online import Ppo

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.engine.critic import open_critic
from plumbline_trainer.engine.distributed import joined_ranks
from plumbline_trainer.engine.online_run import kl_controller, make_learner, open_run, save_learner
from plumbline_trainer.engine.policy_gradient import PolicyObjective, ValueObjective
from plumbline_trainer.engine.prompts import load_prompts
from plumbline_trainer.engine.trained import load_start, report_rows, stage_parameters
from plumbline_trainer.losses.advantages import gae, token_rewards, whiten
from plumbline_trainer.losses.kl import kl_estimate
from plumbline_trainer.watch.figures import critic_figures


def run(context: StageContext) -> StageOutput | None:
    """Learn from the rewards of sampled answers. Nothing is dropped at random."""
    parameters, seed = stage_parameters(context, Ppo)
    with joined_ranks(context.rank, context.world_size, context.device) as ranks:
        # Load
        policy = load_start(context, parameters)
        prompts = load_prompts(context, policy, parameters)
        report_rows(context, prompts.encoded, "training prompts")

        # Build
        scorer, reference = make_learner(context, policy, parameters, seed)
        critic = open_critic(context, policy, parameters, seed)
        run = open_run(context, ranks, policy, scorer, reference, critic, prompts, parameters, seed)
        kl = kl_controller(parameters.kl)
        run.resume(kl=kl)

        # Loop
        for experience in run.rollouts():
            assert experience.values is not None
            divergences = kl_estimate(experience.old, experience.reference, parameters.kl.estimator)
            rewards = torch.cat(
                [
                    token_rewards(divergence, float(score), kl.coefficient)
                    for divergence, score in zip(experience.by_answer(divergences), experience.shaped, strict=True)
                ]
            )
            if parameters.whiten_rewards:
                rewards = whiten(rewards, shift_mean=False)
            pairs = [
                gae(of_answer, values, gamma=parameters.gamma, lam=parameters.gae_lambda)
                for of_answer, values in zip(
                    experience.by_answer(rewards), experience.by_answer(experience.values), strict=True
                )
            ]
            advantages, returns = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            figures = run.learn(
                experience,
                PolicyObjective(
                    experience,
                    whiten(advantages),
                    clip_low=parameters.clip,
                    clip_high=parameters.clip,
                    entropy_coefficient=parameters.entropy_coefficient,
                ),
                ValueObjective(experience, returns, parameters.critic.clip, parameters.critic.coefficient),
            )
            figures |= critic_figures(experience.values, returns) | {"klCoefficient": kl.coefficient}
            kl.update(float(experience.sums(divergences).mean()), len(experience.answers))
            run.close(figures)

        # Save and report
        return save_learner(context, run, policy, parameters, prompts)
