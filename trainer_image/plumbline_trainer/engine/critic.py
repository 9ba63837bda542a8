"""The value function of an actor-critic stage: a second model on the policy's frozen weights, with a scalar head."""

from __future__ import annotations

import copy

import torch
from plumbline_api.online import Ppo
from torch import nn

from plumbline_trainer.context import StageContext
from plumbline_trainer.engine.schedule import random_key
from plumbline_trainer.engine.values import ValueHeads, ValueScorer
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.adapters import attach_lora
from plumbline_trainer.models.policy import Policy
from plumbline_trainer.models.reward import load_reward_model
from plumbline_trainer.models.sharing import shared_backbone


def open_critic(context: StageContext, policy: Policy, parameters: Ppo, seed: int) -> ValueScorer:
    """The critic at the stage's start. With an adapter the policy must carry its own already.

    With an adapter the frozen weights are the policy's own tensors, and only an adapter and a head are new; without
    one the critic is a model of its own. It starts from the policy with a head of zeros, so that the first advantages
    are returns, or from a reward model whose heads are averaged.

    Raises:
        InputError: if the reward model has another tokenizer.
    """
    precision, lora = parameters.training.precision, parameters.lora
    if any(item.role == "critic.start" for item in context.run.inputs):
        item = context.input("critic.start")
        reward = load_reward_model(context, item, precision=precision, device=context.device, beside=policy)
        if reward.tokenizer.digest != policy.tokenizer.digest:
            raise InputError(
                f'stage {context.run.stage}: the policy and the reward model "{item.name}" that its critic starts from '
                "have different tokenizers or chat templates; train the reward model from the same base model, or "
                "leave critic.start out"
            )
        model, heads = reward.scorer.model, ValueHeads(reward.scorer.heads.weight.detach().mean(dim=0, keepdim=True))
        _make_trainable(model, adapter=reward.config.lora is not None)
        return _scorer(model, heads, precision)
    width = int(policy.model.config.get_text_config().hidden_size)
    heads = ValueHeads(torch.zeros(1, width)).to(policy.model.device)
    if lora is None:
        return _scorer(copy.deepcopy(policy.model), heads, precision)
    model = attach_lora(shared_backbone(policy), lora, random_key(seed, "critic"), parameters.freeze)
    return _scorer(model, heads, precision)


def _scorer(model: nn.Module, heads: ValueHeads, precision: str) -> ValueScorer:
    heads.requires_grad_(True)
    scorer = ValueScorer(model, heads.to(model.device), precision=precision)  # type: ignore[arg-type]
    scorer.eval()
    return scorer


def _make_trainable(model: nn.Module, *, adapter: bool) -> None:
    """What the reward model's stage trained is trained on: its adapter, or all of it."""
    for name, parameter in model.named_parameters():
        if not adapter and parameter.is_floating_point():
            parameter.data = parameter.data.float()
        parameter.requires_grad_(".lora_" in name if adapter else parameter.is_floating_point())
