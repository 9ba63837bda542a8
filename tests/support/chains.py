"""Adapters in storage as training stages leave them, without training."""

from __future__ import annotations

from pathlib import Path

from plumbline_api.stagerun import StageInput, StageRun
from plumbline_api.training import Lora
from plumbline_trainer.context import StageOutput
from plumbline_trainer.models import adapters
from plumbline_trainer.models.policy import digest_with, load_policy, policy_meta
from plumbline_trainer.storage.manifests import commit_output
from support import trainer
from support.adapted import attach_and_move

LORA = Lora(rank=4, alpha=8.0)


def train_by_hand(
    folder: Path, name: str, source: StageInput, *, seed: int, size: float = 0.02, type_: str = "sft", lora: Lora = LORA
) -> StageRun:
    """Commit an adapter on what `source` stands for, as a training stage does; its run."""
    run = trainer.stage_run(folder, type_, inputs=[source], parameters={"seed": seed}, stage=name)
    context = trainer.stage_context(folder / name, run)
    policy = load_policy(context, source, precision="float32", device="cpu")
    attach_and_move(policy.model, lora, seed, size)
    adapters.save_adapter(policy.model, lora, context.scratch / "output")
    digest = digest_with(policy, adapters.adapter_of(policy.model, lora))
    meta = policy_meta(policy, form="adapter", merged=None if digest is None else digest[0])
    commit_output(context, StageOutput(context.scratch / "output", "policy", meta))
    return run
