"""Merge: write the weights that a chain of adapters stands for, for serving."""

from __future__ import annotations

from plumbline_api.stages import Merge

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.models.loading import torch_dtype
from plumbline_trainer.models.merging import stored_weights, weights_digest
from plumbline_trainer.models.policy import load_policy, policy_meta
from plumbline_trainer.models.probing import LogitProbe
from plumbline_trainer.models.saving import save_full


def run(context: StageContext) -> StageOutput | None:
    """Load the chain as any stage does, say what rounding cost, and save."""
    if not context.is_main:
        return None
    parameters = dict(context.run.parameters)
    parameters.pop("seed", None)
    merge = Merge.model_validate(parameters)

    # Load
    context.progress.update(0, 3, "loading and merging")
    probe = LogitProbe()
    policy = load_policy(context, context.input("model"), precision="chain", device="cpu", watch=probe)
    dtype = policy.storage_dtype if merge.storage_dtype == "auto" else merge.storage_dtype

    # Save
    context.progress.update(1, 3, "writing weights")
    policy.model.to(torch_dtype(dtype))
    folder = context.scratch / "output"
    save_full(policy.model, policy.tokenizer, folder, dtype)
    context.progress.update(2, 3, "checking weights")
    weights = stored_weights(policy.model)
    same = dtype == policy.storage_dtype and policy.lineage.merged_digest is not None
    digest = policy.lineage.merged_digest if same else weights_digest(weights.items())

    # Report
    metrics: dict[str, float] = {}
    for step in policy.lineage.adapters:
        metrics[f"lostPart.{step.name}"] = step.lost.ratio
        metrics[f"logitKl.{step.name}"] = probe.divergence[step.name]
        metrics[f"logitDifference.{step.name}"] = probe.difference[step.name]
        metrics[f"unchangedShare.{step.name}"] = step.lost.unchanged_share
    totals = {
        "lostPart": max((step.lost.ratio for step in policy.lineage.adapters), default=0.0),
        "logitKl": max(probe.divergence.values(), default=0.0),
        "logitDifference": max(probe.difference.values(), default=0.0),
        "adapters": float(len(policy.lineage.adapters)),
        "parameters": float(sum(weight.numel() for weight in weights.values())),
    }
    context.progress.update(3, 3, "merged", totals)
    return StageOutput(
        folder=folder,
        kind="policy",
        meta=policy_meta(policy, form="full", merged=digest) | {"storageDtype": dtype},
        metrics=totals | metrics,
    )
