"""The value function of an actor-critic stage: a second model on the policy's frozen weights, with a scalar head."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from plumbline_api.online import Ppo
from plumbline_api.training import Lora
from safetensors.torch import save_file
from torch import nn

from plumbline_trainer.context import StageContext
from plumbline_trainer.engine.schedule import random_key
from plumbline_trainer.engine.values import ValueHeads, ValueScorer
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.adapters import attach_lora, save_adapter
from plumbline_trainer.models.policy import Policy
from plumbline_trainer.models.reward import load_reward_model
from plumbline_trainer.models.saving import save_full
from plumbline_trainer.models.sharing import shared_backbone

CRITIC_FOLDER, CRITIC_CONFIG, CRITIC_HEAD = "critic", "critic.json", "head.safetensors"


@dataclass(frozen=True)
class Critic:
    """A value function, and how its weights came about."""

    scorer: ValueScorer
    lora: Lora | None
    """Its adapter; None where all its weights are trained."""
    start: str
    """`policy`, or the name of the reward model's stage."""


def open_critic(context: StageContext, policy: Policy, parameters: Ppo, seed: int) -> Critic:
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
        return Critic(_scorer(model, heads, precision), reward.config.lora, item.name)
    width = int(policy.model.config.get_text_config().hidden_size)
    heads = ValueHeads(torch.zeros(1, width)).to(policy.model.device)
    if lora is None:
        return Critic(_scorer(copy.deepcopy(policy.model), heads, precision), None, "policy")
    model = attach_lora(shared_backbone(policy), lora, random_key(seed, "critic"), parameters.freeze)
    return Critic(_scorer(model, heads, precision), lora, "policy")


def save_critic(folder: Path, critic: Critic, policy: Policy) -> None:
    """Write the critic beside the policy: head, adapter (on what the critic started from) or full weights."""
    folder = folder / CRITIC_FOLDER
    folder.mkdir(parents=True)
    if critic.lora is None:
        save_full(critic.scorer.model, policy.tokenizer, folder, policy.storage_dtype)
    else:
        save_adapter(critic.scorer.model, critic.lora, folder)
    weight = critic.scorer.heads.weight.detach().to("cpu", torch.float32).contiguous()
    save_file({"weight": weight}, str(folder / CRITIC_HEAD), metadata={"format": "pt"})
    document = {"version": 1, "start": critic.start, "tokenizerDigest": policy.tokenizer.digest, "read": "before"}
    (folder / CRITIC_CONFIG).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


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
