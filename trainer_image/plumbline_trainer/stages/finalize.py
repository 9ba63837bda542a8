"""Finalize: the record of a run for programs and for people. Runs after every outcome but deletion, without torch."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.report.card import write_card
from plumbline_trainer.report.documents import lineage, summary
from plumbline_trainer.report.facts import gather
from plumbline_trainer.report.page import render
from plumbline_trainer.storage import uris

LINEAGE, SUMMARY, CARD, REPORT = "lineage.json", "summary.json", "model-card.md", "report.html"


def run(context: StageContext) -> StageOutput | None:
    """Read what the run left, and write four documents beside its plan; the report last, for it tells of the others."""
    if not context.is_main:
        return None
    context.progress.update(0, 2, "reading results")
    facts = gather(context.store, context.run)
    for gap in facts.gaps:
        context.log.warning("could not be read: %s", gap)
    now = datetime.now(UTC)
    context.progress.update(1, 2, "writing the report")
    documents = {
        LINEAGE: _json(lineage(facts, written=now.isoformat(timespec="seconds"))),
        SUMMARY: _json(summary(facts)),
        CARD: write_card(facts).encode(),
        REPORT: render(facts, written=now.strftime("%-d %B %Y, %H:%M UTC")).encode(),
    }
    for name, data in documents.items():
        context.store.put_bytes(uris.join(context.pipeline_root, name), data)
    context.progress.update(2, 2, "report written")
    return StageOutput(
        folder=context.scratch, kind="report", message=f"report: {uris.join(context.pipeline_root, REPORT)}"
    )


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode()
