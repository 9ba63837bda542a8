"""The engine that a stage asks for."""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING

import torch
from plumbline_api.online import Rollout
from plumbline_api.training import Lora

from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.models.policy import Policy
from plumbline_trainer.rollout.huggingface import HuggingFaceRollout
from plumbline_trainer.rollout.interface import RolloutEngine
from plumbline_trainer.rollout.vllm import Sidecar, VllmRollout, find_executable

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext


def open_engine(
    context: StageContext, policy: Policy, rollout: Rollout, *, lora: Lora | None, ranks: Ranks, precision: str
) -> RolloutEngine:
    """The engine, around the policy as it is at any time.

    Raises:
        InputError: if vLLM is asked for where it cannot run.
    """
    if rollout.engine == "vllm":
        return _open_vllm(context, policy, rollout, lora=lora, ranks=ranks, precision=precision)
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


def _open_vllm(
    context: StageContext, policy: Policy, rollout: Rollout, *, lora: Lora | None, ranks: Ranks, precision: str
) -> VllmRollout:
    field = f"stage {context.run.stage}: rollout.engine"
    cuda = context.device.type == "cuda" and torch.cuda.is_available()
    executable = find_executable(field, os.environ, cuda=cuda)
    sidecar = Sidecar(
        executable,
        policy.model,
        policy.tokenizer,
        lora,
        context.scratch / "vllm",
        dtype=precision,
        environment=os.environ,
    )
    atexit.register(sidecar.close)  # the server belongs to this process, however that ends
    context.log.info("answers are sampled by vLLM (%s), which is experimental", executable)
    return VllmRollout(
        sidecar.sync,
        policy.tokenizer,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        ranks=ranks,
    )
