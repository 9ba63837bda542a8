"""The engine that a stage asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plumbline_api.online import Rollout

from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.models.policy import Policy
from plumbline_trainer.rollout.huggingface import HuggingFaceRollout
from plumbline_trainer.rollout.interface import RolloutEngine

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext


def open_engine(
    context: StageContext, policy: Policy, rollout: Rollout, *, ranks: Ranks, precision: str
) -> RolloutEngine:
    """The engine, around the policy as it is at any time."""
    engine = HuggingFaceRollout(
        policy.model,
        policy.tokenizer,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        tokens_per_batch=rollout.tokens_per_batch,
        ranks=ranks,
        precision=precision,
    )
    context.log.info("answers are sampled by transformers: %s", engine.describe())
    return engine
