"""Sentences and numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from plumbline_api.online import ABORTED_REASON

from plumbline_trainer.report.facts import WITH_OUTPUT, RunFacts, StageFacts
from plumbline_trainer.report.figures import BASE, Finding, Value

PHASE_WORDS = {
    "Succeeded": "done",
    "Failed": "failed",
    "Skipped": "skipped",
    "Pending": "not started",
    "Queued": "not started",
    "Running": "stopped",
    "Suspended": "suspended",
}


def verdict(facts: RunFacts, findings: Sequence[Finding]) -> tuple[str, str]:
    """Whether it worked, in one sentence, and its tone: `good`, `bad` or `open`."""
    sentence, tone = _outcome(facts, findings)
    watched = watched_words(facts)
    # What was probably hacked, or stopped by its own rules, did not go well, whatever other figures say.
    return " ".join([sentence, *watched]), "open" if watched and tone == "good" else tone


def _outcome(facts: RunFacts, findings: Sequence[Finding]) -> tuple[str, str]:
    if facts.failures:
        first = facts.failures[0]
        done = sum(stage.succeeded for stage in facts.stages)
        if first.reason == ABORTED_REASON:
            return f"Stage {first.name} was aborted: {first.message}.", "bad"
        if first.reason in WITH_OUTPUT:
            return f"It was stopped at a gate: stage {first.name} did not reach what was asked of it.", "bad"
        return f"It did not finish: {first.name} failed after {done} of {len(facts.stages)} stages were done.", "bad"
    if not facts.succeeded:
        missing = [stage.name for stage in facts.stages if not stage.succeeded]
        return f"It did not finish: {', '.join(missing)} did not run to the end.", "bad"
    if not findings and (measured := [stage for stage in facts.stages if stage.held_out is not None]):
        return f"It ran to the end. {' '.join(map(describe_reward_model, measured))} No policy was measured.", "open"
    if not findings:
        return "It ran to the end, but nothing was measured: the pipeline has no evaluation.", "open"
    return _judged(findings)


def watched_words(facts: RunFacts) -> list[str]:
    """What the rules and monitors of stages that sample have to say, a sentence each; nothing where all is well."""
    found = []
    for stage in facts.stages:
        if stage.aborted is not None and stage.succeeded:
            found.append(f"Stage {stage.name} was aborted: {stage.aborted}.")
        if stage.monitors is not None and stage.monitors.get("verdict") == "hacked":
            found.append(f"In stage {stage.name} {stage.monitors.get('text')}.")
    return found


def first_sentence(text: str) -> tuple[str, str]:
    """The first sentence of a verdict, which says how it went, and what it rests on."""
    first, dot, rest = text.partition(". ")
    return (f"{first}.", rest) if dot else (text, "")


def _judged(findings: Sequence[Finding]) -> tuple[str, str]:
    # What was trained on proves nothing, so it decides only where there is nothing else.
    fair = [finding for finding in findings if not finding.in_sample] or findings
    main = fair[0]
    better = [finding for finding in fair if finding.direction == "better"]
    worse = [finding for finding in fair if finding.direction == "worse"]
    said = describe(main)
    if main.in_sample:
        said += f" But the {' and '.join(main.in_sample)} took part in training: this flatters it."
    others = [finding for finding in worse if finding is not main]
    if main.direction == "better":
        price = f" At a price: {_list([f.label for f in others])} got worse." if others else ""
        return f"It worked. {said}{price}", "open" if others or main.in_sample else "good"
    if main.direction == "worse":
        gain = f" {_list([f.label for f in better]).capitalize()} got better." if better else ""
        return f"It made things worse. {said}{gain}", "bad"
    if better and not worse:
        return f"It worked in part: {_list([f.label for f in better])} got better. {said}", "open"
    if worse:
        return f"It did not help: {_list([f.label for f in worse])} got worse. {said}", "bad"
    return f"It ran to the end, with no clear effect. {said}", "open"


def describe(finding: Finding) -> str:
    """A finding as a sentence with its interval."""
    policy, baseline = model_words(finding.policy), model_words(finding.baseline)
    interval = f"{level(finding.confidence)} interval {interval_text(finding)}"
    if finding.kind == "winRate":
        clear = "" if finding.direction != "unclear" else " That is no clear difference."
        by = "" if finding.judge is None else f", by the {finding.judge}"
        share = percent(finding.value.value)
        return f"The answers of {policy} beat those of {baseline} in {share} of comparisons ({interval}){by}.{clear}"
    before = "" if finding.baseline_value is None else f"{baseline}: {shown(finding, finding.baseline_value)}; "
    clear = "" if finding.direction != "unclear" else " That is no clear change."
    if finding.kind == "preferenceAccuracy":
        value = shown(finding, finding.value)
        return f"{policy} finds the better answer likelier in {value} of held-out pairs ({before}{interval}).{clear}"
    return f"The perplexity of {policy} is {shown(finding, finding.value)} ({before}{interval}).{clear}"


def describe_reward_model(stage: StageFacts) -> str:
    """How good a reward model is, as a sentence with its interval."""
    found = (stage.held_out or {})["accuracy"]
    low, high = found.get("lower"), found.get("upper")
    limits = "unknown" if low is None or high is None else f"{100 * low:.0f}–{percent(high)}"
    share, confidence = percent(found["value"]), level(found["confidence"])
    return (
        f"“{stage.name}” gives the better answer the higher reward in {share} of held-out pairs "
        f"({confidence} interval {limits})."
    )


def model_words(name: str) -> str:
    """A model as people call it."""
    return "the starting model" if name == BASE else f"“{name}”"


def change_text(finding: Finding) -> str:
    """How far a figure moved from the baseline's, with its interval over paired rows; empty where it is not known."""
    change = finding.change
    if change is None or change.lower is None or change.upper is None:
        return ""
    if finding.kind == "perplexity":
        moved, low, high = (f"{100 * (value - 1):+.1f}" for value in (change.value, change.lower, change.upper))
        return f"change {moved}\u00a0% ({low} to {high})".replace("-", "−")
    moved, low, high = (f"{100 * value:+.0f}" for value in (change.value, change.lower, change.upper))
    if {moved, low, high} <= {"+0", "-0"}:
        return "no change"
    return f"change {moved} points ({low} to {high})".replace("-", "−")


def interval_text(finding: Finding) -> str:
    """The limits of a finding's interval."""
    low, high = finding.value.lower, finding.value.upper
    if low is None or high is None:
        return "unknown"
    if finding.kind == "perplexity":
        return f"{perplexity(low)}–{perplexity(high)}"
    return f"{100 * low:.0f}–{percent(high)}"


def shown(finding: Finding, value: Value) -> str:
    """A figure in the unit of its kind."""
    return perplexity(value.value) if finding.kind == "perplexity" else percent(value.value)


def perplexity(value: float) -> str:
    """A perplexity with as many digits as mean something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(value: float | None) -> str:
    """A share, such as `71 %`."""
    return "unknown" if value is None else f"{100 * value:.0f}\u00a0%"


def level(confidence: float) -> str:
    """A confidence level, such as `95 %`."""
    return f"{100 * confidence:g}\u00a0%"


def number(value: float | None) -> str:
    """A number with three or so significant digits and thousands set apart."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    if abs(value) >= 0.01:
        return f"{value:.3g}"
    return f"{value:.1e}"


def compact(count: float) -> str:
    """A count, such as `135M`."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.0f}{letter}" if count >= 10 * unit else f"{count / unit:.1f}{letter}"
    return f"{count:.0f}"


def duration(seconds: float | None) -> str:
    """A time, such as `4 min 41 s`."""
    if seconds is None:
        return "–"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


def size(count: float | None) -> str:
    """Bytes, such as `270 MB`."""
    if count is None:
        return "–"
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
