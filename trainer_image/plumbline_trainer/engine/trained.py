"""What a training stage starts from and what it leaves behind."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import torch
from plumbline_api.training import Freeze, Lora, TrainingStage
from transformers import PreTrainedModel

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.data.encode import EncodedRows
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.models.adapters import adapter_of, attach_lora, save_adapter
from plumbline_trainer.models.merging import LOST_PART_WARNING
from plumbline_trainer.models.policy import Policy, digest_with, lost_part_advice, policy_meta
from plumbline_trainer.models.quantization import quantize
from plumbline_trainer.models.saving import save_full
from plumbline_trainer.models.selection import module_names, select

Parameters = TypeVar("Parameters", bound=TrainingStage)


def stage_parameters(context: StageContext, model: type[Parameters]) -> tuple[Parameters, int]:
    """The stage's parameters and its seed."""
    parameters: dict[str, Any] = dict(context.run.parameters)
    seed = int(parameters.pop("seed", 0))
    return model.model_validate(parameters), seed


def weights_precision(parameters: TrainingStage) -> str:
    """Type of the weights in memory: frozen ones in the stage's precision, trained ones float32."""
    return parameters.training.precision if parameters.lora is not None else "float32"


def make_trainable(policy: Policy, lora: Lora | None, seed: int, *, freeze: Freeze | None) -> PreTrainedModel:
    """Put a fresh adapter on the policy, or train all of it; what `freeze` names stays as it is.

    Raises:
        InputError: if `lora` or `freeze` names what the model does not have.
    """
    model: PreTrainedModel = policy.model
    if lora is not None:
        if lora.quantization is not None:
            quantize(policy, lora.quantization)
        model = attach_lora(model, lora, seed, freeze)
    else:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        for name in select(module_names(model), None, freeze).frozen:
            model.get_submodule(name).requires_grad_(False)
    # After the adapter is on: its own dropout, too, stays off until a stage turns it on.
    model.eval()
    return model


def policy_identity(policy: Policy) -> str:
    """What a policy's weights are, for caches: base and adapters by digest, and how they are held in memory."""
    lineage = policy.lineage
    return json.dumps(
        [
            lineage.base,
            [step.manifest_digest for step in lineage.adapters],
            lineage.merged_digest,
            policy.storage_dtype,
            *([policy.quantization] if policy.quantization is not None else []),
        ],
        sort_keys=True,
    )


def save_policy(
    context: StageContext, run: TrainingRun, policy: Policy, lora: Lora | None, encoded: EncodedRows
) -> StageOutput | None:
    """Write what was trained, on rank 0: the adapter alone, or full weights."""
    if not run.ranks.is_main:
        return None
    folder = context.scratch / "output"
    figures = run.figures()
    figures.update(
        rows=float(len(encoded.rows)),
        droppedRows=float(encoded.dropped),
        truncatedRows=float(encoded.truncated),
        unsharedRows=float(encoded.unshared),
    )
    if lora is None:
        save_full(policy.model, policy.tokenizer, folder, policy.storage_dtype)
        meta = policy_meta(policy, form="full")
    else:
        save_adapter(policy.model, lora, folder)
        merged = digest_with(policy, adapter_of(policy.model, lora))
        meta = policy_meta(policy, form="adapter", merged=None if merged is None else merged[0])
        if merged is not None:
            figures["lostPart"] = merged[1].ratio
            if merged[1].ratio > LOST_PART_WARNING:
                context.log.warning("%s", lost_part_advice(context.run.stage, merged[1], policy.storage_dtype))
    return StageOutput(
        folder=folder,
        kind="policy",
        meta=meta,
        metrics=figures,
        tokens=run.tokens_here,
        first_step=run.first_step,
        last_step=run.state.step,
    )


def report_rows(context: StageContext, encoded: EncodedRows, what: str) -> None:
    """Say what became of the rows."""
    counts = ", ".join(f"{name} {count:,}" for name, count in encoded.counts.items() if count or name == "rows")
    context.log.info("%s: %s", what, counts)
    for example in encoded.examples:
        context.log.warning("%s", example)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory of this process so far: of the device, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
