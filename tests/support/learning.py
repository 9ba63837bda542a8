"""A rollout that is given instead of sampled, as the stages and their objectives take it, and one update on it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.online import ONLINE_STAGES
from plumbline_trainer.data.encode import Encoded, EncodedRows
from plumbline_trainer.data.rows import Message, Row
from plumbline_trainer.engine.accumulation import Measured, accumulate
from plumbline_trainer.engine.critic import Critic
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.experience import Experience
from plumbline_trainer.engine.packing import PackedBatch
from plumbline_trainer.engine.policy_gradient import PolicyObjective, ValueObjective
from plumbline_trainer.engine.prompts import Prompts
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.engine.updates import measure_critic, measure_policy
from plumbline_trainer.engine.values import ValueHeads, ValueScorer, score_values
from plumbline_trainer.rewards.combining import Scored
from plumbline_trainer.rollout.interface import Sampled
from support.tiny import make_tokenizer
from support.trainer import base_model, parameters_of, stage_context, stage_run
from torch import Tensor

CPU = torch.device("cpu")
BUDGET = 64
"""Tokens of a micro-batch: a few answers each, so that every step is made of several."""


def experience_of(prompts: list[list[int]], groups: list[list[list[int]]]) -> Experience:
    """Answers to prompts, without log-probabilities yet."""
    rows = [Encoded(f"row-{number}", f"{number}", ids, []) for number, ids in enumerate(prompts)]
    return Experience(rows, [[Sampled(ids, True) for ids in group] for group in groups], BUDGET)


def scorer_of(model: Any, temperature: float) -> Scorer:
    """The fast path of a model."""
    scorer = Scorer(model.requires_grad_(True))
    scorer.temperature = temperature
    return scorer.eval()


def critic_of(classifier: Any, backbone: Any) -> ValueScorer:
    """A scalar classifier of transformers as a critic: `backbone` is a causal model that takes its weights."""
    backbone.base_model.load_state_dict(classifier.base_model.state_dict())
    heads = ValueHeads(classifier.score.weight.detach().clone())
    return ValueScorer(backbone.requires_grad_(True), heads).eval()


def log_probabilities(scorer: Scorer, experience: Experience) -> Tensor:
    """[N] of all tokens of the answers, without gradients."""
    scores = score_rows(scorer, experience.all_rows, tokens_per_batch=BUDGET, device=CPU)
    return torch.cat([tokens for row in scores for tokens in row])


def values_of(scorer: ValueScorer, experience: Experience) -> Tensor:
    """[N] the critic's values before all tokens, without gradients."""
    found = score_values(scorer, experience.all_rows, tokens_per_batch=BUDGET)
    return torch.cat([part[:, 0] for part in found])


def policy_update(scorer: Scorer, experience: Experience, objective: PolicyObjective) -> dict[str, float]:
    """The stage's own figures of an update; gradients are left at the parameters."""
    return _update(scorer, experience, objective, measure_policy(scorer, objective))


def value_update(scorer: ValueScorer, experience: Experience, objective: ValueObjective) -> dict[str, float]:
    """The same of the critic."""
    return _update(scorer, experience, objective, measure_critic(scorer, objective))


def _update(
    scorer: Scorer,
    experience: Experience,
    objective: PolicyObjective | ValueObjective,
    measure: Callable[[int, PackedBatch], Measured],
) -> dict[str, float]:
    for parameter in scorer.parameters():
        parameter.grad = None
    rows = experience.all_rows
    return accumulate(rows, measure, size=objective.size(rows), tokens_per_batch=BUDGET, ranks=Ranks())


def descend(scorer: Scorer, rate: float) -> None:
    """One step of plain gradient descent."""
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad


class _Captured(Exception):
    """The stage has said what was asked of it."""


def stage_objectives(
    folder: Path,
    type_: str,
    fields: dict[str, Any],
    rollout: tuple[list[list[int]], list[list[list[int]]], list[list[float]]],
    *,
    policy: Any,
    reference: Any,
    critic: Any = None,
) -> tuple[list[int], Experience, PolicyObjective, ValueObjective | None]:
    """What a stage itself makes of a rollout before its first update; its prompts are numbered as given.

    Args:
        folder: For models and scratch.
        type_: Of the stage.
        fields: Of the stage, in wire form.
        rollout: Prompts, [prompt][answer] ids and their scores, in place of the sampler's and the rewards'.
        policy: A causal model, trained whole.
        reference: Another one.
        critic: A scalar classifier whose weights the critic takes.

    Returns:
        The order of prompts, the rollout as the stage holds it, and its objectives.
    """
    prompts, groups, scores = rollout
    stage = importlib.import_module(f"plumbline_trainer.stages.{type_}")
    for name, model in {"policy": policy, "reference": reference}.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    parameters = parameters_of(
        ONLINE_STAGES[type_].model_validate(
            {
                "prompts": "rows",
                "rewards": [{"rule": "length"}],
                "answers": len(groups[0]),
                "training": {"globalBatch": len(prompts), "tokensPerBatch": BUDGET, "maxLength": 512},
                **fields,
            }
        )
    )
    inputs = [
        base_model((folder / "policy").as_uri()),
        base_model((folder / "reference").as_uri(), role="reference"),
    ]
    context = stage_context(folder, stage_run(folder, type_, parameters=parameters, inputs=inputs))
    encoded = [Encoded(f"row-{number}", f"{number}", ids, []) for number, ids in enumerate(prompts)]
    ends = make_tokenizer().eos_token_id
    held: list[Any] = []

    class Given:
        """In place of sampler and rewards."""

        def sample(self, asked: Any, **_: Any) -> list[list[Sampled]]:
            self.order = [int(prompt.row_id.removeprefix("row-")) for prompt in asked]
            return [[Sampled(ids, ids[-1] == ends) for ids in groups[number]] for number in self.order]

        def score(self, _candidates: Any, **_: Any) -> Scored:
            return Scored(torch.tensor([score for number in self.order for score in scores[number]]), {}, None)

    given = Given()
    originals = {
        name: getattr(stage, name) for name in ("load_prompts", "open_run", "open_critic") if hasattr(stage, name)
    }

    def load_prompts(_context: Any, own: Any, _parameters: Any) -> Prompts:
        rows = {row.row_id: Row(row.row_id, row.group, (Message("user", ""),), ()) for row in encoded}
        return Prompts(EncodedRows(encoded), [], rows, own.tokenizer)

    def open_critic(*arguments: Any) -> Critic:
        made: Critic = originals["open_critic"](*arguments)
        made.scorer.model.base_model.load_state_dict(critic.base_model.state_dict())
        made.scorer.heads.weight.data = critic.score.weight.detach().clone()
        return made

    def open_run(*arguments: Any) -> Any:
        run = originals["open_run"](*arguments)
        run.engine = run.rewards = given

        def learn(*objectives: Any) -> Any:
            held.extend(objectives)
            raise _Captured

        run.learn = learn
        return run

    replacements = {"load_prompts": load_prompts, "open_run": open_run, "open_critic": open_critic}
    try:
        for name in originals:
            setattr(stage, name, replacements[name])
        with pytest.raises(_Captured):
            stage.run(context)
    finally:
        for name, function in originals.items():
            setattr(stage, name, function)
    experience, objective, *values = held
    return given.order, experience, objective, values[0] if values else None
