"""What merging cost, in words: rounding of a chain, distance between several models."""

from __future__ import annotations

from plumbline_trainer.report import words
from plumbline_trainer.report.facts import StageFacts

LOST_PART_WARNING = 0.3
"""As in `models.merging`, which needs torch."""


def describe_merge(stage: StageFacts) -> tuple[str, str] | None:
    """(good | bad, sentence) of a merge that is done; None of other stages."""
    lost = stage.metrics.get("lostPart")
    if stage.record.type != "merge" or not stage.metrics:
        return None
    tone = "bad" if lost is not None and lost > LOST_PART_WARNING else "good"
    if (method := stage.record.parameters.get("method")) is not None:
        return tone, _of_models(stage, str(method))
    if lost is None:
        return None
    divergence = words.number(stage.metrics.get("logitKl"))
    said = f"Merging kept {1 - lost:.1%} of every change: {divergence} nats per token between adapter and merged."
    if (difference := stage.metrics.get("logitDifference")) is not None:
        said += f" No logit moved by more than {words.number(difference)}."
    return tone, said


def _of_models(stage: StageFacts, method: str) -> str:
    models = sorted(name.partition(".")[2] for name in stage.metrics if name.startswith("logitKl."))
    apart = ", ".join(f"{words.number(stage.metrics[f'logitKl.{name}'])} from {name}" for name in models)
    said = f"Merging {len(models)} models by {method}: predictions differ by {apart} (nats per token)."
    if (conflicts := stage.metrics.get("signConflicts")) is not None:
        said += f" At {words.percent(conflicts)} of the changed weights they pull in opposite directions."
    if straight := stage.metrics.get("straightTensors"):
        said += f" {words.number(straight)} tensors are nearly parallel or zero and were averaged."
    if (lost := stage.metrics.get("lostPart", 0.0)) > LOST_PART_WARNING:
        said += f" Rounding took {words.percent(lost)} of the change: set merge.storageDtype to float32."
    return said
