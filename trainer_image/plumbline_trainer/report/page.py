"""report.html: one file without scripts or anything from outside, for a phone, a desk and paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plumbline_api.fingerprint import digest_of

from plumbline_trainer.report import words
from plumbline_trainer.report.facts import RunFacts, StageFacts
from plumbline_trainer.report.figures import Finding, Value, find, tabulate
from plumbline_trainer.report.merges import describe_merge
from plumbline_trainer.report.trainings import training_of

TEMPLATES = Path(__file__).parent / "templates"
ANSWERS_MAX = 48
ANSWER_CHARACTERS_MAX = 4000


@dataclass(frozen=True)
class Gauge:
    """A figure on a line: where it lies, its interval, and what it is compared with. All in percent of the line."""

    low: float
    width: float
    point: float
    reference: float | None
    start: str
    end: str


@dataclass(frozen=True)
class Tile:
    """One deciding figure."""

    label: str
    value: str
    interval: str
    before: str
    note: str
    direction: str
    direction_word: str
    gauge: Gauge | None


@dataclass(frozen=True)
class AnswerSet:
    """Answers side by side."""

    title: str
    note: str
    policy: str
    baseline: str
    records: list[dict[str, Any]]
    left_out: int


def render(facts: RunFacts, *, written: str) -> str:
    """The page.

    Args:
        facts: of the run.
        written: when, for people.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(str(TEMPLATES)),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": words.duration,
        "number": words.number,
        "percent": words.percent,
        "compact": words.compact,
        "size": words.size,
        "perplexity": words.perplexity,
        "short": lambda digest: "–" if not digest else str(digest)[:12],
    }
    return environment.get_template("report.html.j2").render(page=build(facts, written=written))


def build(facts: RunFacts, *, written: str) -> dict[str, Any]:
    """Everything that the template shows."""
    findings = find(facts)
    sentence, tone = words.verdict(facts, findings)
    outcome, evidence = words.first_sentence(sentence)
    return {
        "name": facts.name,
        "namespace": facts.record.pipeline.namespace,
        "written": written,
        "outcome": outcome,
        "evidence": evidence,
        "tone": tone,
        "failures": facts.failures,
        "tiles": [_tile(finding) for finding in findings],
        "table": tabulate(facts, findings),
        "base": _base(facts),
        "stages": [_stage_row(facts, stage) for stage in facts.stages],
        "cost": _cost(facts),
        "final": _final(facts),
        "succeeded": facts.succeeded,
        "trainings": [made for stage in facts.stages if (made := training_of(stage)) is not None],
        "answers": [made for stage in facts.evaluations for made in _answer_sets(stage)],
        "datasets": _datasets(facts),
        "checks": _checks(facts, findings),
        "settings": [(stage.name, stage.record.type, _flat(stage.record.parameters)) for stage in facts.stages],
        "seed": facts.record.seed,
        "inputs": [(item.name, item.uri, facts.pin(item.name) or "") for item in facts.record.external_inputs],
        "outputs": [stage for stage in facts.stages if stage.digest is not None],
        "record": facts.record,
        "record_digest": digest_of(facts.record.to_wire()),
        "gaps": facts.gaps,
        "phase_words": words.PHASE_WORDS,
    }


def _tile(finding: Finding) -> Tile:
    notes = []
    if finding.judge is not None:
        form = ", which judges form and not truth" if finding.judge.startswith("rule") else ""
        notes.append(f"judge: {finding.judge}{form}")
    notes.append(f"{words.number(finding.prompts)} prompts of {finding.dataset}, {finding.split} split")
    if finding.in_sample:
        notes.append(f"in-sample: the {' and '.join(finding.in_sample)} took part in training")
    if (first := finding.document.get("firstPreferred")) is not None:
        notes.append(f"the judge took the answer shown first in {words.percent(first)} of its verdicts")
    before = "" if finding.baseline_value is None else words.shown(finding, finding.baseline_value)
    if finding.kind == "winRate":
        counts = [finding.document.get(key, 0) for key in ("wins", "ties", "losses")]
        half = " (each counts half)" if counts[1] else ""
        before = f"{counts[0]} won, {counts[1]} tied{half}, {counts[2]} lost"
    elif before:
        before = f"{finding.baseline}: {before}"
    if change := words.change_text(finding):
        before = f"{before}, {change}"
    direction = {"better": "better", "worse": "worse", "unclear": "no clear difference"}[finding.direction]
    return Tile(
        label=finding.label[:1].upper() + finding.label[1:],
        value=words.shown(finding, finding.value),
        interval=f"{words.level(finding.confidence)} interval {words.interval_text(finding)}",
        before=before,
        note=" · ".join(notes),
        direction=finding.direction,
        direction_word=direction,
        gauge=_gauge(finding),
    )


def _gauge(finding: Finding) -> Gauge | None:
    value = finding.value
    if value.lower is None or value.upper is None:
        return None
    start, end, reference = 0.0, 1.0, 0.5
    if finding.kind == "perplexity":
        known = [value.lower, value.upper, *([finding.baseline_value.value] if finding.baseline_value else [])]
        room = 0.15 * (max(known) - min(known)) or 1.0
        start, end = max(min(known) - room, 0.0), max(known) + room
    if finding.baseline_value is not None:
        reference = finding.baseline_value.value

    def place(number: float) -> float:
        return round(100 * min(max((number - start) / (end - start), 0.0), 1.0), 2)

    shows_reference = finding.kind == "winRate" or finding.baseline_value is not None
    return Gauge(
        low=place(value.lower),
        width=round(place(value.upper) - place(value.lower), 2),
        point=place(value.value),
        reference=place(reference) if shows_reference else None,
        start=words.shown(finding, Value(start)),
        end=words.shown(finding, Value(end)),
    )


def _base(facts: RunFacts) -> dict[str, Any]:
    model = facts.record.external_inputs[0]
    found = ((facts.plan or {}).get("models") or {}).get("model") or {}
    return {"uri": model.uri, "parameters": found.get("parameters"), "architecture": found.get("architecture")}


def _stage_row(facts: RunFacts, stage: StageFacts) -> dict[str, Any]:
    outcome = stage.outcome
    sources = [ref for ref in stage.record.inputs if ref.role.partition(".")[0] in ("model", "models")]
    data = next((ref for ref in stage.record.inputs if ref.role in ("dataset", "prompts")), None)
    lora = stage.record.parameters.get("lora")
    what = []
    if data is not None and data.external is not None:
        rows = stage.metrics.get("rows")
        name = facts.record.external_inputs[data.external].name.removeprefix("dataset/")
        what.append(f"{words.number(rows)} rows of {name}" if rows is not None else name)
    if lora:
        what.append(f"{'DoRA' if lora.get('dora') else 'LoRA'} rank {lora['rank']}")
        what += [f"{', '.join(lora['modulesToSave'])} whole"] if lora.get("modulesToSave") else []
    elif data is not None:
        what.append("all weights")
    if (steps := stage.metrics.get("steps")) is not None:
        what.append(f"{words.number(steps)} steps")
    return {
        "name": stage.name,
        "type": stage.record.type,
        "phase": stage.phase,
        "word": _word(stage),
        "aborted": stage.aborted,
        "reason": None if outcome is None else outcome.reason,
        "message": None if outcome is None else outcome.message,
        "attempts": 0 if outcome is None else outcome.attempts,
        "seconds": None if outcome is None or outcome.cached else outcome.seconds,
        "gpu_seconds": None if outcome is None else outcome.gpu_seconds,
        "tokens": None if stage.manifest is None else _tokens(stage),
        "source": " + ".join(ref.stage or "base" for ref in sources) or None,
        "what": ", ".join(what),
        "yields_policy": stage.yields_policy,
    }


def _word(stage: StageFacts) -> str:
    """How a stage ended, in a word or two."""
    if stage.aborted is not None:
        return "aborted"
    if stage.outcome is not None and stage.outcome.cached:
        return "found in storage"
    return words.PHASE_WORDS.get(stage.phase, "")


def _cost(facts: RunFacts) -> dict[str, Any]:
    """What this run spent; stages found in storage cost it nothing."""
    fresh = [item for item in facts.outcomes if not item.cached]
    seconds = [item.seconds for item in fresh if item.seconds is not None]
    gpu = [item.gpu_seconds for item in fresh if item.gpu_seconds is not None]
    computed = {item.name for item in fresh}
    there = {stage.name: _tokens(stage) for stage in facts.stages if stage.manifest is not None}
    return {
        "seconds": sum(seconds) if seconds else None,
        "tokens": sum(tokens for name, tokens in there.items() if name in computed),
        "cached_tokens": sum(tokens for name, tokens in there.items() if name not in computed),
        "gpu_seconds": sum(gpu) if gpu else 0.0,
        "cached": sum(stage.outcome is not None and stage.outcome.cached for stage in facts.stages),
        "stages": len(facts.stages),
    }


def _tokens(stage: StageFacts) -> int:
    """Tokens of the whole stage; the manifest counts those of the attempt that ended it."""
    assert stage.manifest is not None
    return int(stage.metrics.get("tokens", stage.manifest.tokens))


def _final(facts: RunFacts) -> dict[str, Any] | None:
    stage = facts.final
    if stage is None or stage.manifest is None:
        return None
    return {
        "name": stage.name,
        "uri": stage.output_uri,
        "form": stage.manifest.meta.get("form"),
        "dtype": stage.manifest.meta.get("storageDtype"),
        "bytes": sum(file.size for file in stage.manifest.files),
    }


def _answer_sets(stage: StageFacts) -> list[AnswerSet]:
    document = stage.evaluation or {}
    names = [str(document.get(side, {}).get("name", side)) for side in ("policy", "baseline")]
    sets = []
    for suite in document.get("suites", []):
        if suite.get("kind") not in ("samples", "winRate") or not suite.get("records"):
            continue
        judge = suite.get("judge") or {}
        nouns = {"rule": "judged by the rule", "reward": "judged by the reward model"}
        what = nouns.get(str(judge.get("kind")), "judged by")
        title = f"Prompts of {suite['dataset']}" + (f", {what} “{judge['text']}”" if judge else "")
        generation = suite.get("generation") or {}
        heat = generation.get("temperature", 0)
        note = f"At most {generation.get('maxNewTokens', '?')} tokens, " + (
            "the likeliest token each time." if not heat else f"sampled at temperature {heat:g}."
        )
        records = [_answer(record) for record in suite["records"][:ANSWERS_MAX]]
        sets.append(AnswerSet(title, note, names[0], names[1], records, len(suite["records"]) - len(records)))
    return sorted(sets, key=lambda item: "judged" in item.title)


def _answer(record: dict[str, Any]) -> dict[str, Any]:
    outcome = record.get("outcome")
    word = "" if outcome is None else "tie" if outcome == 0.5 else "wins" if outcome > 0.5 else "loses"
    return {
        "prompt": str(record.get("prompt", ""))[:ANSWER_CHARACTERS_MAX],
        "policy": str(record.get("policy", ""))[:ANSWER_CHARACTERS_MAX],
        "baseline": str(record.get("baseline", ""))[:ANSWER_CHARACTERS_MAX],
        "policy_cut": not record.get("policyFinished", True),
        "baseline_cut": not record.get("baselineFinished", True),
        "same": record.get("change", 1) == 0,
        "word": word,
        "reason": {"both": "both fulfil it", "neither": "neither fulfils it"}.get(str(record.get("reason")), ""),
    }


def _datasets(facts: RunFacts) -> list[dict[str, Any]]:
    """Every dataset with its splits, as preflight found it."""
    found = {str(item.get("name")): item for item in (facts.plan or {}).get("datasets", []) if isinstance(item, dict)}
    rows = []
    for item in facts.record.external_inputs:
        if item.kind != "dataset":
            continue
        name = item.name.removeprefix("dataset/")
        known = found.get(name, {})
        splits = known.get("splits") or {}
        rows.append(
            {
                "name": name,
                "uri": item.uri,
                "format": known.get("format", item.settings.get("format", "–")),
                "splits": {split: (splits.get(split) or {}).get("rows") for split in ("train", "evaluation", "test")},
                "tokens": (splits.get("train") or splits.get("test") or {}).get("tokens") or {},
                "bad": known.get("bad"),
                "known": bool(known),
            }
        )
    return rows


def _checks(facts: RunFacts, findings: list[Finding]) -> list[tuple[str, str]]:
    """(good | bad | open, sentence): what stands in the way of trusting the figures."""
    checks: list[tuple[str, str]] = []
    plan = facts.plan
    if plan is not None:
        leaks = plan.get("leaks") or []
        checks += [("bad", _leak(leak)) for leak in leaks]
        if not leaks:
            checks.append(("good", "No held-out prompt of one dataset is among the training prompts of another."))
    for finding in findings:
        if finding.in_sample:
            what = " and ".join(finding.in_sample)
            checks.append(("bad", f"{finding.label}: the {what} took part in training, so the figure is in-sample."))
    if findings and not any(finding.in_sample for finding in findings):
        checks.append(("good", "No judge and no measured row took part in training."))
    for stage in facts.stages:
        if (said := describe_merge(stage)) is not None:
            checks.append(said)
        if stage.monitors is not None:
            tone = {"hacked": "bad", "suspicious": "open"}.get(str(stage.monitors.get("verdict")), "good")
            checks.append((tone, f"{stage.name}: {stage.monitors.get('text')}."))
    for item in _datasets(facts):
        if item["bad"]:
            checks.append(
                ("open", f"{item['name']}: {words.number(item['bad'])} rows of the wrong shape were skipped.")
            )
    for finding in findings:
        cut, dropped = finding.document.get("truncated", 0), finding.document.get("dropped", 0)
        if cut or dropped:
            checks.append(
                ("open", f"{finding.label}: {cut} rows were cut and {dropped} left out, too long for the model.")
            )
    return list(dict.fromkeys(checks))


def _leak(leak: Any) -> str:
    if not isinstance(leak, dict) or not {"trained", "tested", "count", "of"} <= set(leak):
        return f"Held-out prompts are among those that were trained on: {leak}"
    return (
        f"{words.number(leak['count'])} of {words.number(leak['of'])} measured prompts of {leak['tested']} are among "
        f"the training prompts of {leak['trained']}: figures over them flatter the model."
    )


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines."""
    if isinstance(value, dict):
        return [line for key in value for line in _flat(value[key], f"{path}.{key}" if path else str(key))]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [line for index, item in enumerate(value) for line in _flat(item, f"{path}[{index}]")]
    if isinstance(value, list):
        return [(path, ", ".join(map(str, value)))]
    return [(path, f"{value:g}" if isinstance(value, float) else str(value))]
