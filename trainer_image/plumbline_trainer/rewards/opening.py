"""The declared rewards of a stage, opened."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from plumbline_api.online import Reward

from plumbline_trainer.context import StageContext
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.policy import Policy
from plumbline_trainer.models.reward import load_reward_model
from plumbline_trainer.rewards.combining import RewardSet
from plumbline_trainer.rewards.interface import Component
from plumbline_trainer.rewards.learned import StageReward
from plumbline_trainer.rewards.rules import RuleReward, make_rule


def open_rewards(
    context: StageContext,
    rewards: Sequence[Reward],
    policy: Policy,
    *,
    ranks: Ranks,
    device: torch.device,
    precision: str,
    tokens_per_batch: int = 4096,
) -> RewardSet:
    """Open every declared reward: load models, read schemas, find functions and endpoints.

    Args:
        context: of the stage; outputs and models come as its inputs `rewards.<index>.…`.
        rewards: as declared.
        policy: that is trained. With its adapter on already, reward models on the same weights share them.
        ranks: processes of the stage.
        device: where models go.
        precision: of models: `float32` or `bfloat16`.
        tokens_per_batch: token budget of one forward pass of a model.

    Raises:
        InputError: naming the reward that cannot be opened.
    """
    del ranks
    found: list[Component] = []
    for number, reward in enumerate(rewards):
        place = f"rewards[{number}]"
        if reward.stage is not None:
            item = context.input(f"rewards.{number}.stage")
            model = load_reward_model(
                context,
                item,
                precision=precision,
                device=device,
                tokens_per_batch=tokens_per_batch,
                beside=policy,
            )
            how = "on the policy's frozen weights" if model.shared_with is not None else "with weights of its own"
            context.log.info("%s: reward model %s, %s", place, item.name, how)
            found.append(StageReward(model, reward))
        elif reward.rule is not None:
            found.append(RuleReward(make_rule(reward, place)))
        else:
            raise InputError(f"{place}: {reward.choice} is not known to this trainer")
    return RewardSet(rewards, found)
