"""The declared rewards of a stage, opened."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from plumbline_api.online import Reward
from plumbline_api.runtime import RewardEndpoint
from plumbline_api.stagerun import StageInput

from plumbline_trainer.context import StageContext
from plumbline_trainer.data.sources import fetch_model
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.classifier import Classifier
from plumbline_trainer.models.loading import load_classifier
from plumbline_trainer.models.policy import Policy
from plumbline_trainer.models.reward import load_reward_model
from plumbline_trainer.rewards.combining import RewardSet
from plumbline_trainer.rewards.endpoints import EndpointReward
from plumbline_trainer.rewards.functions import open_function
from plumbline_trainer.rewards.interface import Component
from plumbline_trainer.rewards.learned import ClassifierReward, StageReward
from plumbline_trainer.rewards.metrics import MetricReward
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
                ranks=ranks,
            )
            how = "on the policy's frozen weights" if model.shared_with is not None else "with weights of its own"
            context.log.info("%s: reward model %s, %s", place, item.name, how)
            found.append(StageReward(model, reward))
        elif reward.rule is not None:
            found.append(RuleReward(make_rule(reward, place)))
        elif reward.metric is not None:
            found.append(MetricReward(reward, place))
        elif reward.model is not None:
            item = context.input(f"rewards.{number}.model")
            classifier = open_classifier(context, item, precision, device)
            classifier.tokens_per_batch = tokens_per_batch
            found.append(ClassifierReward(classifier))
        elif reward.function is not None:
            found.append(open_function(reward.function, context.input(f"rewards.{number}.function").digest))
        else:
            found.append(EndpointReward(_endpoint(context, str(reward.endpoint), place), stop=context.stop))
    return RewardSet(rewards, found)


def open_classifier(context: StageContext, item: StageInput, precision: str, device: torch.device) -> Classifier:
    """A sequence classifier from outside, compared with its pinned digest.

    Raises:
        InputError: if it is none, or has changed.
    """
    assert item.uri is not None
    folder = fetch_model(context, item.uri, item.digest)
    model, tokenizer = load_classifier(folder, precision, device)
    return Classifier(model, tokenizer, item.uri, precision, log=context.log)


def _endpoint(context: StageContext, name: str, place: str) -> RewardEndpoint:
    found = next((item for item in context.run.endpoints or [] if item.name == name), None)
    if found is None:
        raise InputError(f'{place}.endpoint: the stage was started without the endpoint "{name}"')
    return found
