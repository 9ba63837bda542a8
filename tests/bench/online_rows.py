"""How much arithmetic an iteration of a stage that samples asks for, ours and trl's: what bounds its speed-up.

As in `trainer_rows.py`, of the products alone. Every answer has `new_tokens` tokens. What each side does was read in its
source: trl 1.12's ppo takes the policy's log-probabilities from generation, and the head at every position; trl 1.16's
grpo takes it at the answers. Both pad the prompts of a step to the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from bench.measured import PPO_EPOCHS, Task
from bench.trainer_rows import Shape, pass_operations, shape_of
from plumbline_trainer.models.selection import module_names


def online_shape(model: str, rank: int) -> Shape:
    """The shape of a model folder with an adapter on all of its linear layers. No weight is read."""
    import transformers

    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model))
    linear = [empty.get_submodule(name) for name in module_names(empty).linear]
    return shape_of(empty, sum(rank * (layer.in_features + layer.out_features) for layer in linear))


def online_operations(shape: Shape, task: Task, prompts: Sequence[int]) -> float:
    """Of the whole run of a side.

    Args:
        shape: Of the model.
        task: What is run; ppo or grpo.
        prompts: Tokens of the prompts, in the order in which they are answered.
    """
    steps = [prompts[at : at + task.global_batch] for at in range(0, len(prompts), task.global_batch)]
    if task.side == "ours":
        return sum(_our_prompt(shape, task, length) for length in prompts)
    return sum(_their_answer(shape, task, max(step)) * len(step) * task.answers for step in steps)


def _our_prompt(shape: Shape, task: Task, prompt: int) -> float:
    """A prompt with its answers: sampled on merged weights, looked at, learnt from."""
    answers, new = task.answers, task.new_tokens
    plain, bare = replace(shape, adapter=0), replace(shape, head=0)
    tokens, scored = prompt + answers * new, answers * new
    written = answers * new * (prompt + new / 2)
    pairs = prompt**2 / 2 + written
    sampled = _pass(plain, prompt, prompt**2 / 2, 1) + _pass(plain, scored, written, scored)
    # Log-probabilities and entropies take the head once each.
    looked = _pass(shape, tokens, pairs, 2 * scored)
    learnt = _pass(shape, tokens, pairs, scored, trained=True)
    if task.method == "ppo":
        looked += _pass(plain, tokens, pairs, scored) + _pass(bare, tokens, pairs, 0)
        learnt = PPO_EPOCHS * (learnt + _pass(bare, tokens, pairs, 0, trained=True))
    return sampled + looked + learnt


def _their_answer(shape: Shape, task: Task, prompt: int) -> float:
    """An answer with a prompt of its own, padded."""
    new = task.new_tokens
    plain, bare = replace(shape, adapter=0), replace(shape, head=0)
    tokens, written = prompt + new, new * (prompt + new / 2)
    pairs = prompt**2 / 2 + written
    sampled = _pass(shape, prompt, prompt**2 / 2, 1) + _pass(shape, new, written, new)
    if task.method == "grpo":
        return sampled + _pass(shape, tokens, pairs, new, trained=True)
    looked = _pass(plain, tokens, pairs, tokens) + _pass(bare, tokens, pairs, 0)
    learnt = _pass(shape, tokens, pairs, tokens, trained=True) + _pass(bare, tokens, pairs, 0, trained=True)
    return sampled + looked + PPO_EPOCHS * learnt


def _pass(shape: Shape, tokens: float, pairs: float, scored: float, *, trained: bool = False) -> float:
    return pass_operations(shape, tokens, pairs, 2.0 * shape.head * scored, products=2, trained=trained)
