"""lineage.json and summary.json: the record of a run for programs."""

from __future__ import annotations

from typing import Any

from plumbline_trainer.report import words
from plumbline_trainer.report.facts import RunFacts, StageFacts
from plumbline_trainer.report.figures import find, tabulate

LINEAGE_VERSION = 1
SUMMARY_VERSION = 1


def lineage(facts: RunFacts, *, written: str) -> dict[str, Any]:
    """The alignment record: starting model, data, stages and evaluations, linked by digests."""
    record = facts.record
    final = facts.final
    return {
        "version": LINEAGE_VERSION,
        "written": written,
        "pipeline": record.pipeline.to_wire(),
        "recordDigest": record.digest(),
        "seed": record.seed,
        "inputs": [
            {"name": item.name, "kind": item.kind, "uri": item.uri, "sha256": facts.pin(item.name)}
            | ({"settings": item.settings} if item.settings else {})
            for item in record.external_inputs
        ],
        "stages": [_stage(stage) for stage in facts.stages],
        "evaluations": [
            {
                "stage": stage.name,
                "policy": (stage.evaluation or {}).get("policy"),
                "baseline": (stage.evaluation or {}).get("baseline"),
                "manifest": stage.digest,
                "metrics": stage.metrics,
            }
            for stage in facts.evaluations
        ],
        "model": None if final is None else {"stage": final.name, "uri": final.output_uri, "manifest": final.digest},
        "record": record.to_wire(),
        "gaps": facts.gaps,
    }


def _stage(stage: StageFacts) -> dict[str, Any]:
    found: dict[str, Any] = {"name": stage.name, "type": stage.record.type, "phase": stage.phase}
    outcome = stage.outcome
    if outcome is not None:
        found |= {
            key: value for key, value in outcome.to_wire().items() if key not in ("name", "type", "phase", "gpuSeconds")
        }
        found["gpuSeconds"] = outcome.gpu_seconds
    manifest = stage.manifest
    if manifest is not None:
        found |= {
            "uri": stage.output_uri,
            "manifest": stage.digest,
            "files": [file.to_wire() for file in manifest.files],
            "parents": [parent.to_wire() for parent in manifest.parents],
            "meta": manifest.meta,
            "metrics": manifest.metrics,
            "tokens": manifest.tokens,
        }
    return found


def summary(facts: RunFacts) -> dict[str, Any]:
    """What a terminal shows: one sentence, and a table of metrics by model."""
    findings = find(facts)
    sentence, tone = words.verdict(facts, findings)
    table = tabulate(facts, findings)
    final = facts.final
    return {
        "version": SUMMARY_VERSION,
        "pipeline": {"name": facts.name, "namespace": facts.record.pipeline.namespace},
        "succeeded": facts.succeeded,
        "sentence": sentence,
        "tone": tone,
        "columns": table.columns,
        "rows": table.rows,
        "model": None if final is None else {"stage": final.name, "uri": final.output_uri},
    }
