"""The answers that a best-of-n stage samples and scores, once for all of its attempts."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from plumbline_api.online import BestOfN

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.data.documents import row_from_document, row_to_document, rows_to_lines
from plumbline_trainer.data.encode import Encoded, EncodedRows, encode_rows
from plumbline_trainer.data.rows import Message, Response, Row
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.prompts import Prompts
from plumbline_trainer.engine.schedule import random_key
from plumbline_trainer.engine.trained import policy_identity
from plumbline_trainer.engine.winners import (
    answer_figures,
    gold_figures,
    mark_winners,
    refuse_no_winner,
    winning_rows,
)
from plumbline_trainer.errors import Interrupted, TransientError
from plumbline_trainer.models.policy import Policy
from plumbline_trainer.models.tokenizer import Tokenizer
from plumbline_trainer.rewards.combining import RewardSet, Scored
from plumbline_trainer.rewards.opening import open_rewards
from plumbline_trainer.rollout.interface import Sampled
from plumbline_trainer.rollout.opening import open_engine
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.kept import keep_bytes, kept_bytes

KEPT, SUFFIX = "answers", ".json"
"""Where the answers lie below the run's root."""
OUTPUT = "answers.jsonl"
"""The same in the output, rows v1."""
DECIDING = ("rewardGain", "reward", "rewardBest", "goldReward", "goldRewardBest", "winners")
"""Figures that people and gates look at first."""


@dataclass(frozen=True)
class AnswerSet:
    """Every prompt with its scored answers; those that are imitated are labelled."""

    train: list[Row]
    held_out: list[Row]
    seconds: dict[str, float]
    """What sampling and scoring took."""

    def to_bytes(self) -> bytes:
        """JSON that gives the same numbers back."""
        document = {
            "train": [row_to_document(row) for row in self.train],
            "heldOut": [row_to_document(row) for row in self.held_out],
            "seconds": self.seconds,
        }
        return json.dumps(document, ensure_ascii=False, allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> AnswerSet:
        """The set that the bytes were made of."""
        document = json.loads(data)
        train, held_out = ([row_from_document(item) for item in document[name]] for name in ("train", "heldOut"))
        return cls(train, held_out, document["seconds"])

    def figures(self) -> dict[str, float]:
        """Of the training prompts, and what gold rewards say of the held-out ones."""
        return {**answer_figures(self.train), **gold_figures(self.held_out)}


def find_answers(
    context: StageContext, ranks: Ranks, policy: Policy, prompts: Prompts, parameters: BestOfN, seed: int
) -> AnswerSet:
    """The answers that a former attempt has kept; else sampled by the policy as it is, scored and kept.

    Raises:
        InputError: if nothing is worth imitating, or a reward cannot be opened or read.
        Interrupted: on SIGTERM; what was not kept is sampled again, with the same random numbers.
    """
    place = uris.join(context.run_root, KEPT)
    data = kept_bytes(context.store, place, SUFFIX)
    # Every rank reads for itself; if one finds none, all sample.
    if ranks.any(data is None):
        data = _sample_and_score(context, ranks, policy, prompts, parameters, seed).to_bytes()
        if ranks.is_main:
            keep_bytes(context.store, place, SUFFIX, data)
    elif ranks.is_main:
        context.log.info("answers of a former attempt are found in storage")
    assert data is not None
    found = AnswerSet.from_bytes(data)
    if ranks.is_main:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in found.figures().items())
        context.log.info("answers: %s", shown)
    refuse_no_winner(found.train, parameters.min_score)
    return found


def encode_winners(answers: AnswerSet, tokenizer: Tokenizer, max_length: int) -> tuple[EncodedRows, list[Encoded]]:
    """Winners to imitate and to evaluate on, as `sft` encodes them."""
    train = encode_rows(winning_rows(answers.train), tokenizer, method="completion", max_length=max_length)
    held_out = winning_rows(answers.held_out)
    if not held_out:
        return train, []
    return train, encode_rows(held_out, tokenizer, method="completion", max_length=max_length).rows


def with_answers(output: StageOutput, answers: AnswerSet, training_seconds: float) -> StageOutput:
    """The output with all answers beside the weights, and their figures."""
    lines = rows_to_lines([*answers.train, *answers.held_out])
    (output.folder / OUTPUT).write_text(lines, encoding="utf-8")
    figures = answers.figures()
    # Not all figures travel: those in front do.
    first = {name: figures.pop(name) for name in DECIDING if name in figures}
    seconds = {**answers.seconds, "secondsTraining": training_seconds}
    return dataclasses.replace(output, metrics={**first, **output.metrics, **figures, **seconds})


def _sample_and_score(
    context: StageContext, ranks: Ranks, policy: Policy, prompts: Prompts, parameters: BestOfN, seed: int
) -> AnswerSet:
    def tell(message: str) -> None:
        if ranks.is_main:
            context.progress.update(0, 1, message)

    def at_step(share: float) -> None:
        tell(f"sampling answers, {share:.0%}")
        # Ranks sample unlike numbers of tokens, so that they can only leave together at the end of it.
        if ranks.size == 1:
            _leave_if_stopped(context, ranks)

    started = time.monotonic()
    policy.model.eval()
    engine = open_engine(
        context,
        policy,
        parameters.rollout,
        lora=None,  # the policy as it is; what the stage trains comes after
        ranks=ranks,
        precision=parameters.training.precision,
    )
    asked = [*prompts.train, *prompts.held_out]
    samples = engine.sample(
        [prompts.to_answer(row) for row in asked],
        answers=parameters.answers,
        seed=random_key(seed, "best of n"),
        at_step=at_step,
    )
    _leave_if_stopped(context, ranks)
    sampled = time.monotonic()
    tell("scoring answers")
    rewards = open_rewards(
        context,
        parameters.rewards,
        policy,
        ranks=ranks,
        device=context.device,
        precision=parameters.training.precision,
        tokens_per_batch=parameters.training.token_budget,
    )
    writer = policy_identity(policy)
    count = len(prompts.train)
    # Training answers first: normalisation is by their moments.
    train, held_out = (
        _scored_rows(
            context, prompts, asked[part], samples[part], rewards, parameters, seed, writer, ranks, is_held_out
        )
        for part, is_held_out in ((slice(count), False), (slice(count, None), True))
    )
    _leave_if_stopped(context, ranks)
    seconds = {"secondsGenerating": sampled - started, "secondsScoring": time.monotonic() - sampled}
    return AnswerSet(train, held_out, seconds)


def _scored_rows(
    context: StageContext,
    prompts: Prompts,
    asked: Sequence[Encoded],
    samples: Sequence[Sequence[Sampled]],
    rewards: RewardSet,
    parameters: BestOfN,
    seed: int,
    writer: str,
    ranks: Ranks,
    is_held_out: bool,
) -> list[Row]:
    """The prompts' rows with the sampled answers in place of their own."""
    if not asked:
        return []
    candidates = prompts.candidates(asked, samples)
    try:
        scored = rewards.score(candidates, held_out=is_held_out, ranks=ranks)
    except TransientError:
        _leave_if_stopped(context, ranks)
        raise
    rollout = parameters.rollout
    how = {
        "engine": rollout.engine,
        "temperature": rollout.temperature,
        "maxNewTokens": rollout.max_new_tokens,
        "seed": seed,
    }
    rows = []
    for number, (encoded, group) in enumerate(zip(asked, samples, strict=True)):
        first = number * parameters.answers
        answers = tuple(
            Response(
                id=str(index),
                messages=(Message("assistant", candidates[first + index].answer),),
                score=float(scored.total[first + index]),
                annotations=_annotations(scored, first + index),
                policy_digest=writer,
                sampling={**how, "tokens": len(one.ids), "finished": one.finished},
            )
            for index, one in enumerate(group)
        )
        row = dataclasses.replace(prompts.rows[encoded.row_id], responses=answers, margin=0.0)
        rows.append(mark_winners(row, keep=parameters.keep, min_score=parameters.min_score))
    return rows


def _annotations(scored: Scored, index: int) -> dict[str, object]:
    """Raw values of every reward, and the weighted sum of gold ones."""
    found: dict[str, object] = {"rewards": {name: float(values[index]) for name, values in scored.components.items()}}
    return found if scored.gold is None else {**found, "gold": float(scored.gold[index])}


def _leave_if_stopped(context: StageContext, ranks: Ranks) -> None:
    if ranks.any(context.stop.requested):
        raise Interrupted(0, "stopped while answers were sampled and scored; the next attempt samples the same ones")
