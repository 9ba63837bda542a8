"""Merge: write the weights that a chain of adapters stands for, or one model made of several, for serving."""

from __future__ import annotations

import gc
from typing import Any

import torch
from plumbline_api.stages import MERGE_DEFAULTS, Merge
from safetensors import safe_open
from torch import Tensor

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.combining import Account, Recipe, combine
from plumbline_trainer.models.dtypes import place_weights, torch_dtype
from plumbline_trainer.models.merging import LOST_PART_WARNING, stored_weights, weights_digest
from plumbline_trainer.models.parts import Part, check_fit, set_aside
from plumbline_trainer.models.policy import Policy, load_policy, policy_meta
from plumbline_trainer.models.probing import LogitProbe, mean_divergence, probe_ids, probe_logits
from plumbline_trainer.models.saving import save_full


def run(context: StageContext) -> StageOutput | None:
    """Merge one chain or several models, say what it cost, and save."""
    if not context.is_main:
        return None
    parameters = dict(context.run.parameters)
    seed = int(parameters.pop("seed", 0))
    merge = Merge.model_validate(parameters)
    return merge_chain(context, merge) if merge.method is None else merge_models(context, merge, merge.method, seed)


def merge_chain(context: StageContext, merge: Merge) -> StageOutput:
    """Load the chain as any stage does, say what rounding cost, and save."""
    # Load
    context.progress.update(0, 3, "loading and merging")
    probe = LogitProbe()
    policy = load_policy(context, context.input("model"), precision="chain", device="cpu", watch=probe)
    dtype = policy.storage_dtype if merge.storage_dtype == "auto" else merge.storage_dtype

    # Save
    context.progress.update(1, 3, "writing weights")
    place_weights(policy.model, dtype, "cpu")
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


def merge_models(context: StageContext, merge: Merge, method: str, seed: int) -> StageOutput:
    """Set every model's weights aside in a file, then combine them tensor by tensor: one model is in memory at a time.

    Raises:
        InputError: if the models do not have the same tokenizer and the same weights by name and shape.
    """
    # Load
    inputs = context.inputs_with("models.")
    based = [item for item in context.run.inputs if item.role == "base"]
    steps = len(inputs) + len(based) + 2
    parts: list[Part] = []
    predictions: list[list[Tensor]] = []
    policy: Policy | None = None
    for number, item in enumerate([*based, *inputs]):
        policy = None  # Give its memory back before the next one is loaded.
        gc.collect()
        context.progress.update(number, steps, f"loading {item.name}")
        policy = load_policy(context, item, precision="chain", device="cpu")
        parts.append(set_aside(policy, item, context.scratch / "parts" / f"{number}.safetensors"))
        check_fit(parts[0], parts[-1])
        if item not in based:
            predictions.append([probe_logits(policy.model, ids) for ids in probe_ids(policy.tokenizer)])
    assert policy is not None
    base, models = (parts[0] if based else None), parts[len(based) :]
    types = {part.storage_dtype for part in models}
    dtype = merge.storage_dtype if merge.storage_dtype != "auto" else types.pop() if len(types) == 1 else "float32"

    # Combine
    context.progress.update(steps - 2, steps, f"combining by {method}")
    shares = [model.weight for model in merge.models or []]
    read = {name: getattr(merge, name) for name in MERGE_DEFAULTS[method]}
    recipe = Recipe(
        method,
        tuple(share / sum(shares) for share in shares),
        seed=seed,
        **{name: default if read[name] is None else read[name] for name, default in MERGE_DEFAULTS[method].items()},
    )
    account = Account()
    place_weights(policy.model, dtype, "cpu")
    distances = _combine_into(policy, recipe, base, models, dtype, account)

    # Save
    context.progress.update(steps - 1, steps, "writing weights")
    folder = context.scratch / "output"
    save_full(policy.model, policy.tokenizer, folder, dtype)
    weights = stored_weights(policy.model)
    digest = weights_digest(weights.items())

    # Report
    found = [probe_logits(policy.model, ids) for ids in probe_ids(policy.tokenizer)]
    metrics = {
        f"logitKl.{part.name}": mean_divergence(expected, found)
        for part, expected in zip(models, predictions, strict=True)
    }
    metrics |= {f"distance.{part.name}": distance for part, distance in zip(models, distances, strict=True)}
    totals = {
        "logitKl": max(metrics[f"logitKl.{part.name}"] for part in models),
        "models": float(len(models)),
        "parameters": float(sum(weight.numel() for weight in weights.values())),
    }
    if method == "slerp":
        totals["straightTensors"] = float(account.straight)
        if account.straight:
            context.log.info(
                "%d of %d tensors are nearly parallel or zero: they were averaged on the straight line",
                account.straight,
                account.tensors,
            )
    if base is not None:
        totals |= {
            "lostPart": account.lost_part,
            "signConflicts": account.conflicts / account.touched if account.touched else 0.0,
        }
        if account.lost_part > LOST_PART_WARNING:
            context.log.warning(
                "rounding to %s loses %.0f%% of the merged change. Set merge.storageDtype: float32",
                dtype,
                100 * account.lost_part,
            )
    context.progress.update(steps, steps, "merged", totals)
    meta = policy_meta(policy, form="full", merged=digest) | {"storageDtype": dtype, "method": method}
    meta["models"] = [part.origin | {"share": share} for part, share in zip(models, recipe.shares, strict=True)]
    # The weights that the last model started from have no meaning for the result.
    meta.pop("startDigest", None)
    return StageOutput(folder=folder, kind="policy", meta=meta, metrics=totals | metrics)


@torch.no_grad()
def _combine_into(
    policy: Policy, recipe: Recipe, base: Part | None, models: list[Part], dtype: str, account: Account
) -> list[float]:
    """Replace a policy's weights by the combined ones; the distance of each model, ‖θ − θᵢ‖/‖θᵢ‖."""
    target = torch_dtype(dtype)
    apart, own = [0.0] * len(models), [0.0] * len(models)
    readers: list[Any] = [safe_open(str(part.file), framework="pt") for part in models]
    start: Any = None if base is None else safe_open(str(base.file), framework="pt")
    for name, weight in stored_weights(policy.model).items():
        if not weight.is_floating_point():
            continue
        tensors: list[Tensor] = [reader.get_tensor(name) for reader in readers]
        origin: Tensor | None = None if start is None else start.get_tensor(name)
        merged = combine(recipe, name, tensors, origin, target, account)
        if not bool(torch.isfinite(merged).all()):
            raise InputError(f'merging gives weights of "{name}" that are not finite: one of the models has diverged')
        for number, tensor in enumerate(tensors):
            apart[number] += float((merged.float() - tensor.float()).norm()) ** 2
            own[number] += float(tensor.float().norm()) ** 2
        weight.data = merged
    return [(one / other) ** 0.5 if other else 0.0 for one, other in zip(apart, own, strict=True)]
