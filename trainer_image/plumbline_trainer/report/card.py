"""model-card.md: a model card as the Hugging Face Hub reads it."""

from __future__ import annotations

from typing import Any

import yaml
from plumbline_api.methods import TRAINING_STAGES

from plumbline_trainer.report import words
from plumbline_trainer.report.facts import RunFacts
from plumbline_trainer.report.figures import Finding, find

BUNDLED = {"bundled://smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Repositories from which bundled models come."""


def write_card(facts: RunFacts) -> str:
    """The card: a YAML header, then what was made from what, how well it does, and what is not known."""
    findings = find(facts)
    header = yaml.safe_dump(_header(facts, findings), sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\n{_body(facts, findings)}"


def hub_name(uri: str) -> str | None:
    """The repository on the Hub that a source stands for, if it is one."""
    if uri in BUNDLED:
        return BUNDLED[uri]
    if not uri.startswith("hf://"):
        return None
    return uri.removeprefix("hf://").removeprefix("datasets/").partition("@")[0].strip("/")


def _header(facts: RunFacts, findings: list[Finding]) -> dict[str, Any]:
    types = [stage.record.type for stage in facts.stages if stage.succeeded and stage.record.type in TRAINING_STAGES]
    header: dict[str, Any] = {"license": "unknown", "library_name": "transformers", "pipeline_tag": "text-generation"}
    if (base := hub_name(facts.record.external_inputs[0].uri)) is not None:
        header["base_model"] = base
    named = [name for item in facts.record.external_inputs if item.kind == "dataset" and (name := hub_name(item.uri))]
    if named:
        header["datasets"] = named
    header["tags"] = ["plumbline", *dict.fromkeys(types)]
    if findings:
        header["model-index"] = [
            {"name": facts.name, "results": [_result(finding) for finding in findings]},
        ]
    return header


def _result(finding: Finding) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": finding.dataset, "type": finding.dataset, "split": finding.split},
        "metrics": [{"type": finding.kind, "name": finding.label, "value": round(finding.value.value, 6)}],
    }


def _body(facts: RunFacts, findings: list[Finding]) -> str:
    sentence, _ = words.verdict(facts, findings)
    lines = [f"# {facts.name}", "", _plain(sentence), ""]
    for failure in facts.failures:
        lines += [f"**{failure.name}** failed ({failure.reason}): {_plain(failure.message or '')}", ""]
    lines += ["## How it was made", "", f"Starting model: `{facts.record.external_inputs[0].uri}`", ""]
    lines += ["| Stage | Type | From | Data | State |", "|---|---|---|---|---|"]
    for stage in facts.stages:
        roles = {ref.role: ref for ref in stage.record.inputs}
        sources = [ref.stage or "base" for role, ref in roles.items() if role.partition(".")[0] in ("model", "models")]
        source = " + ".join(sources) or "–"
        data = [
            facts.record.external_inputs[ref.external].name.removeprefix("dataset/")
            for ref in stage.record.inputs
            if ref.external is not None and facts.record.external_inputs[ref.external].kind == "dataset"
        ]
        state = words.PHASE_WORDS.get(stage.phase, stage.phase)
        row = (stage.name, stage.record.type, source, ", ".join(dict.fromkeys(data)) or "–", state)
        lines.append(f"| {' | '.join(map(_cell, row))} |")
    lines += ["", "## Evaluation", ""]
    if findings:
        lines += ["| Metric | Model | Value | Interval | Before | Prompts |", "|---|---|---|---|---|---|"]
        for finding in findings:
            before = "–" if finding.baseline_value is None else words.shown(finding, finding.baseline_value)
            figures = (
                finding.label + (f" (judge: {finding.judge})" if finding.judge else ""),
                finding.policy,
                words.shown(finding, finding.value),
                f"{words.interval_text(finding)} ({words.level(finding.confidence)})",
                before,
                words.number(finding.prompts),
            )
            lines.append(f"| {' | '.join(map(_cell, figures))} |")
        marked = [finding for finding in findings if finding.in_sample]
        lines += [""] + [f"In-sample, so too good: {finding.label}." for finding in marked]
    else:
        lines.append("Nothing was measured.")
    lines += _reward_models(facts)
    lines += [
        "",
        "## What is not known",
        "",
        "The licence of the result follows from the starting model and the data; it is not stated here. "
        "No evaluation of safety or bias was made beyond what stands above.",
        "",
        "## Record",
        "",
        f"Seed {facts.record.seed}. Inputs by SHA-256:",
        "",
        *(
            f"- {item.name}: `{item.uri}` `{facts.pin(item.name) or 'not pinned'}`"
            for item in facts.record.external_inputs
        ),
        "",
        "Everything else is in `lineage.json` and `report.html` beside this card.",
        "",
    ]
    return "\n".join(lines)


def _reward_models(facts: RunFacts) -> list[str]:
    """What is known of the reward models that were trained on the way; they are no part of the model itself."""
    rows = []
    for stage in facts.stages:
        if not (stage.succeeded and stage.yields_reward_model):
            continue
        figures, measured = stage.metrics, (stage.held_out or {}).get("accuracy") or {}
        shown, interval = "not measured", "–"
        if measured:
            shown = words.percent(measured["value"])
            low, high = measured.get("lower"), measured.get("upper")
            level = words.level(measured["confidence"])
            interval = "unknown" if low is None or high is None else f"{100 * low:.0f}–{words.percent(high)} ({level})"
        numbers = [words.number(figures.get(name)) for name in ("calibrationError", "lengthSpearman")]
        cells = (stage.name, shown, interval, words.number(measured.get("prompts")), *numbers)
        rows.append(f"| {' | '.join(map(_cell, cells))} |")
    if not rows:
        return []
    head = [
        "| Stage | Accuracy | Interval | Prompts | Calibration error | Correlation with length |",
        "|---|---|---|---|---|---|",
    ]
    return ["", "## Reward models", "", *head, *rows]


def _plain(text: str) -> str:
    return " ".join(text.replace("<", "&lt;").split())


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")
