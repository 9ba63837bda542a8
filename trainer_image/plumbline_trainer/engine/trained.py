"""What a training stage starts from and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol, TypeVar

from plumbline_api.record import own_parameters
from plumbline_api.training import Freeze, Lora, Training, TunedStage
from transformers import PreTrainedModel

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.data.encode import EncodedRows
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.range_test import smoothed, suggest
from plumbline_trainer.engine.sharding import is_sharded, whole
from plumbline_trainer.models.adapters import adapter_of, attach_lora, save_adapter
from plumbline_trainer.models.dtypes import holds_stored
from plumbline_trainer.models.merging import LOST_PART_WARNING, stored_weights, weights_digest
from plumbline_trainer.models.policy import Policy, digest_with, load_policy, lost_part_advice, policy_meta
from plumbline_trainer.models.quantization import quantize
from plumbline_trainer.models.saving import save_full
from plumbline_trainer.models.selection import module_names, select
from plumbline_trainer.report.curves import draw_range_test, standalone

Parameters = TypeVar("Parameters", bound=TunedStage)


def stage_parameters(context: StageContext, model: type[Parameters]) -> tuple[Parameters, int]:
    """The stage's parameters and its seed."""
    given = context.run.parameters
    return model.model_validate(own_parameters(given)), int(given.get("seed", 0))


def weights_precision(parameters: TunedStage) -> str:
    """Type of the weights in memory: frozen ones in the stage's precision, trained ones float32."""
    return parameters.training.precision if parameters.lora is not None else "float32"


def load_start(context: StageContext, parameters: TunedStage) -> Policy:
    """The policy that a stage starts from, on its device; what is held in four bits or sharded waits on the CPU."""
    quantized = parameters.lora is not None and parameters.lora.quantization is not None
    waits = quantized or (parameters.training.sharding == "full" and context.world_size > 1)
    return load_policy(
        context,
        context.input("model"),
        precision=weights_precision(parameters),
        device="cpu" if waits else context.device,
        stored=not waits and holds_stored(parameters, device=context.device.type),
    )


def make_trainable(policy: Policy, lora: Lora | None, seed: int, *, freeze: Freeze | None) -> PreTrainedModel:
    """Put a fresh adapter on the policy, or train all of it; what `freeze` names stays as it is.

    Raises:
        InputError: if `lora` or `freeze` names what the model does not have.
    """
    model: PreTrainedModel = policy.model
    if lora is not None:
        quantize(policy, lora, freeze)
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
    """What a policy's weights in memory are, by content alone, for caches: neither names nor places enter."""
    lineage = policy.lineage
    content = lineage.merged_digest
    if content is None and not lineage.adapters:
        content = lineage.base.get("digest") or lineage.base.get("manifestDigest")
    if content is None:  # a model that nobody pinned, or a chain whose merge nobody has recorded
        weights = stored_weights(policy.model).items()
        content = weights_digest(
            (name, whole(weight).cpu() if is_sharded(weight) else weight) for name, weight in weights
        )
    return f"{content}/{policy.storage_dtype}/{policy.precision}/{policy.quantization or 'whole'}"


class Attempt(Protocol):
    """What is told of an attempt at training when its weights are saved."""

    ranks: Ranks
    training: Training
    tokens_here: int
    """Tokens of this attempt."""
    first_step: int
    """Steps that were done when it began."""

    @property
    def last_step(self) -> int:
        """Steps that are done."""
        ...

    def figures(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Figures at the end."""
        ...


def save_policy(
    context: StageContext, run: Attempt, policy: Policy, lora: Lora | None, encoded: EncodedRows
) -> StageOutput | None:
    """Write what was trained, on rank 0: the adapter alone, or full weights; of a range test its report."""
    if isinstance(run, TrainingRun):
        if run.training.range_test is not None:
            return save_range_test(context, run) if run.ranks.is_main else None
        run.gather()
    if not run.ranks.is_main:
        return None
    folder = context.scratch / "output"
    counts = row_counts(encoded)
    if lora is None:
        save_full(policy.model, policy.tokenizer, folder, policy.storage_dtype)
        meta = policy_meta(policy, form="full")
    else:
        save_adapter(policy.model, lora, folder)
        merged = digest_with(policy, adapter_of(policy.model, lora))
        meta = policy_meta(policy, form="adapter", merged=None if merged is None else merged[0])
        if merged is not None:
            counts = {"lostPart": merged[1].ratio, **counts}
            if merged[1].ratio > LOST_PART_WARNING:
                context.log.warning("%s", lost_part_advice(context.run.stage, merged[1], policy.storage_dtype))
    return StageOutput(
        folder=folder,
        kind="policy",
        meta=meta,
        metrics=run.figures(counts),
        tokens=run.tokens_here,
        first_step=run.first_step,
        last_step=run.last_step,
    )


def save_range_test(context: StageContext, run: TrainingRun) -> StageOutput:
    """Write what a learning-rate range test found: `range-test.json` and a plot. It yields no weights."""
    folder = context.scratch / "output"
    folder.mkdir(parents=True, exist_ok=True)
    rates, losses = [rate for rate, _ in run.state.sweep], [loss for _, loss in run.state.sweep]
    suggested = suggest(rates, losses)
    document = {
        "kind": "learningRateRangeTest",
        "suggestedLearningRate": suggested,
        "ended": run.state.ended or "the sweep reached its end",
        "points": [
            {"learningRate": rate, "loss": loss, "smoothedLoss": smooth}
            for rate, loss, smooth in zip(rates, losses, smoothed(losses), strict=True)
        ],
    }
    (folder / "range-test.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    if len(rates) >= 2:
        plot = draw_range_test(context.run.stage, rates, losses, suggested)
        (folder / "range-test.svg").write_text(standalone(plot.svg), encoding="utf-8")
    figures: dict[str, float] = {"steps": float(run.state.step), "tokens": float(run.state.tokens)}
    message = "no rate at which the loss falls was found; widen training.rangeTest"
    if suggested is not None:
        figures["suggestedLearningRate"] = suggested
        message = f"suggested learning rate {suggested:.2g}"
    return StageOutput(
        folder=folder,
        kind="report",
        metrics=figures,
        tokens=run.tokens_here,
        first_step=run.first_step,
        last_step=run.state.step,
        message=message,
    )


def row_counts(encoded: EncodedRows) -> dict[str, float]:
    """What became of the rows, as figures of a stage."""
    return {
        "rows": float(len(encoded.rows)),
        "droppedRows": float(encoded.dropped),
        "truncatedRows": float(encoded.truncated),
        "unsharedRows": float(encoded.unshared),
    }


def report_rows(context: StageContext, encoded: EncodedRows, what: str) -> None:
    """Say what became of the rows."""
    counts = ", ".join(f"{name} {count:,}" for name, count in encoded.counts.items() if count or name == "rows")
    context.log.info("%s: %s", what, counts)
    for example in encoded.examples:
        context.log.warning("%s", example)
