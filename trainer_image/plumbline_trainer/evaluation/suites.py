"""Suites: from what two models did to figures with intervals and a record per row. No model here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from plumbline_api.evaluation import Suite

from plumbline_trainer.data.rows import Row
from plumbline_trainer.evaluation import statistics
from plumbline_trainer.evaluation.judges import Question, Verdict, describe_rule
from plumbline_trainer.evaluation.measuring import Measured, SuiteRows
from plumbline_trainer.evaluation.statistics import Estimate

PRIMARY, INTERVAL, CONTEXT, DETAIL = range(4)
"""Importance of a figure: only the first 20 of a stage travel in its termination message."""


@dataclass
class SuiteResult:
    """What a suite found."""

    index: int
    kind: str
    metric: str
    """Name of its metric; empty for samples."""
    figures: list[tuple[int, str, float]] = field(default_factory=list)
    """(importance, name, value)"""
    document: dict[str, Any] = field(default_factory=dict)
    """Everything, with a record per row."""

    def add(self, importance: int, suffix: str, value: float) -> None:
        """Add a figure of this suite."""
        self.figures.append((importance, f"{self.metric}{suffix}", value))

    def add_estimate(self, estimate: Estimate) -> None:
        """Add the suite's figure and its interval."""
        self.add(PRIMARY, "", estimate.value)
        self.add(INTERVAL, ".lower", estimate.lower)
        self.add(INTERVAL, ".upper", estimate.upper)


Judge = Callable[[SuiteRows, Sequence[Question]], list[Verdict]]


def metric_names(suites: Sequence[Suite]) -> list[str]:
    """Name of each suite's metric: its kind; of several of a kind the later ones also carry their dataset's name.

    `perplexity`, then `perplexity.manuals`; a third one over the same dataset `perplexity.manuals-2`.
    """
    names: list[str] = []
    for suite in suites:
        name = suite.choice
        if name in names:
            name = f"{suite.choice}.{suite.dataset}"
        number = 2
        while name in names:
            name = f"{suite.choice}.{suite.dataset}-{number}"
            number += 1
        names.append(name)
    return names


def important_first(results: Sequence[SuiteResult]) -> dict[str, float]:
    """All figures by name, the deciding ones of every suite before the details of any."""
    found = [figure for result in results for figure in result.figures]
    return {name: value for _, name, value in sorted(found, key=lambda figure: figure[0]) if math.isfinite(value)}


def compare(
    item: SuiteRows, metric: str, policy: Measured, baseline: Measured, judge: Judge, *, confidence: float, seed: int
) -> SuiteResult:
    """Evaluate one suite."""
    result = SuiteResult(item.index, item.kind, metric)
    value = item.suite.value
    result.document = {
        "kind": item.kind,
        "metric": metric,
        "dataset": value.dataset,
        "split": value.split,
        "rows": len(item.rows),
        "truncated": policy.truncated.get(item.index, 0),
        "dropped": policy.dropped.get(item.index, 0),
    }
    if item.kind == "perplexity":
        _perplexity(result, item, policy, baseline, confidence, seed)
    elif item.kind == "preferenceAccuracy":
        _preference_accuracy(result, item, policy, baseline, confidence, seed)
    elif item.kind == "winRate":
        _win_rate(result, item, policy, baseline, judge, confidence, seed)
    else:
        result.document["generation"] = value.generation.to_wire()
        result.document["records"] = _answers(item, policy, baseline)
    return result


def _perplexity(
    result: SuiteResult, item: SuiteRows, policy: Measured, baseline: Measured, confidence: float, seed: int
) -> None:
    rows = {row.id: row for row in item.rows}
    mine = _summed(policy, item.index)
    theirs = _summed(baseline, item.index)
    ids = list(mine)
    groups = [_group(rows, row_id) for row_id in ids]
    loss, tokens = [-mine[i][0] for i in ids], [float(mine[i][1]) for i in ids]
    estimate = statistics.ratio(loss, tokens, groups, confidence=confidence, seed=seed).mapped(_exp)
    result.add_estimate(estimate)
    result.document |= {"estimate": describe(estimate), "tokens": int(sum(tokens))}
    records: list[dict[str, Any]] = [{"id": i, "tokens": mine[i][1], "nll": -mine[i][0]} for i in ids]
    # Perplexities of different tokenizers count different things and do not compare.
    if policy.tokenizer_digest == baseline.tokenizer_digest and set(theirs) == set(mine):
        before = statistics.ratio([-theirs[i][0] for i in ids], tokens, groups, confidence=confidence, seed=seed)
        change = statistics.ratio(
            [-mine[i][0] + theirs[i][0] for i in ids], tokens, groups, confidence=confidence, seed=seed
        ).mapped(_exp)
        result.add(CONTEXT, ".baseline", _exp(before.value))
        result.add(DETAIL, ".change", change.value)
        result.document |= {"baseline": describe(before.mapped(_exp)), "change": describe(change)}
        for record in records:
            record["nllBaseline"] = -theirs[record["id"]][0]
    result.document["records"] = records


def _preference_accuracy(
    result: SuiteResult, item: SuiteRows, policy: Measured, baseline: Measured, confidence: float, seed: int
) -> None:
    rows = {row.id: row for row in item.rows}
    mine, theirs = _margins(policy, item.index), _margins(baseline, item.index)
    ids = [row_id for row_id in mine if row_id in theirs]
    groups = [_group(rows, row_id) for row_id in ids]
    right = [_half_at_zero(mine[i]) for i in ids]
    before = [_half_at_zero(theirs[i]) for i in ids]
    estimate = statistics.share(right, groups, confidence=confidence, seed=seed)
    base = statistics.share(before, groups, confidence=confidence, seed=seed)
    change = statistics.mean(
        [a - b for a, b in zip(right, before, strict=True)], groups, confidence=confidence, seed=seed
    )
    result.add_estimate(estimate)
    result.add(CONTEXT, ".baseline", base.value)
    result.add(DETAIL, ".change", change.value)
    result.document |= {
        "estimate": describe(estimate),
        "baseline": describe(base),
        "change": describe(change),
        "records": [
            {
                "id": i,
                "prompt": read_prompt(rows[i]),
                "chosen": rows[i].chosen.text,
                "rejected": rejected.text if (rejected := rows[i].labelled("rejected")) is not None else "",
                "margin": mine[i],
                "marginBaseline": theirs[i],
            }
            for i in ids
        ],
    }


def _win_rate(
    result: SuiteResult,
    item: SuiteRows,
    policy: Measured,
    baseline: Measured,
    judge: Judge,
    confidence: float,
    seed: int,
) -> None:
    suite = item.suite.win_rate
    assert suite is not None
    records = _answers(item, policy, baseline)
    questions = [Question(r["id"], r["prompt"], r["policy"], r["baseline"]) for r in records]
    verdicts = judge(item, questions)
    outcomes = [verdict.outcome for verdict in verdicts]
    rows = {row.id: row for row in item.rows}
    groups = [_group(rows, record["id"]) for record in records]
    estimate = statistics.share(outcomes, groups, confidence=confidence, seed=seed)
    result.add_estimate(estimate)
    wins, ties = sum(o > 0.5 for o in outcomes), sum(o == 0.5 for o in outcomes)
    counts = {"wins": wins, "ties": ties, "losses": len(outcomes) - wins - ties}
    for name, count in counts.items():
        result.add(DETAIL, f".{name}", float(count))
    for record, verdict in zip(records, verdicts, strict=True):
        record |= {"outcome": verdict.outcome, "reason": verdict.reason}
    result.document |= {
        "estimate": describe(estimate),
        "generation": suite.generation.to_wire(),
        "judge": describe_judge(item.suite),
        **counts,
        "pValue": statistics.sign_test([o - 0.5 for o in outcomes]),
        "meanTokens": _mean([r["policyTokens"] for r in records]),
        "meanTokensBaseline": _mean([r["baselineTokens"] for r in records]),
    }
    if suite.judge.rule is not None:
        for name, side in (("fulfilled", "policy"), ("fulfilledBaseline", "baseline")):
            result.document[name] = sum(v.reason in ("both", side) for v in verdicts) / len(verdicts)
        result.add(CONTEXT, ".fulfilled", result.document["fulfilled"])
        result.add(CONTEXT, ".fulfilled.baseline", result.document["fulfilledBaseline"])
    firsts = [v.first_preferred for v in verdicts if v.first_preferred is not None]
    if firsts:
        # Share of all verdicts for the answer shown first: ½ for a judge without a bias.
        result.document["firstPreferred"] = _mean(firsts)
        result.add(CONTEXT, ".firstPreferred", _mean(firsts))
    result.document["records"] = records


def _answers(item: SuiteRows, policy: Measured, baseline: Measured) -> list[dict[str, Any]]:
    """Answers side by side, the prompts whose answers changed most first."""
    mine, theirs = policy.answers[item.index], baseline.answers[item.index]
    records = []
    for row in item.rows:
        if row.id not in mine or row.id not in theirs:
            continue
        after, before = mine[row.id], theirs[row.id]
        records.append(
            {
                "id": row.id,
                "prompt": read_prompt(row),
                "policy": after.text,
                "baseline": before.text,
                "policyTokens": after.tokens,
                "baselineTokens": before.tokens,
                "policyFinished": after.finished,
                "baselineFinished": before.finished,
                "change": round(difference(before.text, after.text), 4),
                **({"reference": row.chosen.text} if row.responses else {}),
            }
        )
    return sorted(records, key=lambda record: (-float(str(record["change"])), str(record["id"])))


def difference(before: str, after: str) -> float:
    """How much two answers differ, by words: 0 equal, 1 nothing in common."""
    return 1.0 - SequenceMatcher(None, before.split(), after.split(), autojunk=False).ratio()


def read_prompt(row: Row) -> str:
    """A prompt as people read it: a single turn as it is, a dialogue with its roles."""
    if len(row.prompt) == 1:
        return row.prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in row.prompt)


def describe_judge(suite: Suite) -> dict[str, Any]:
    """A judge in words."""
    assert suite.win_rate is not None
    judge = suite.win_rate.judge
    if judge.rule is not None:
        return {"kind": "rule", "text": describe_rule(judge.rule)}
    if judge.stage is not None:
        return {"kind": "reward", "text": judge.stage}
    assert judge.model is not None
    return {"kind": "model", "text": judge.model.source, "rubric": judge.model.rubric}


def describe(estimate: Estimate) -> dict[str, Any]:
    """An estimate as JSON; a limit that is not known is null."""
    return {
        "value": _finite(estimate.value),
        "lower": _finite(estimate.lower),
        "upper": _finite(estimate.upper),
        "prompts": estimate.clusters,
        "method": estimate.method,
    }


def _summed(measured: Measured, index: int) -> dict[str, tuple[float, int]]:
    """Row → log-likelihood and tokens. A document that was cut into `id/0`, `id/1`, … counts as one row."""
    found: dict[str, tuple[float, int]] = {}
    for row_id, likelihoods in measured.likelihoods.get(index, {}).items():
        for item in likelihoods:
            logp, tokens = found.get(row_id, (0.0, 0))
            found[row_id] = (logp + item.logp, tokens + item.tokens)
    return {row_id: pair for row_id, pair in found.items() if pair[1] > 0}


def _margins(measured: Measured, index: int) -> dict[str, float]:
    """Row → mean log-probability per token of the chosen answer minus that of the rejected one."""
    found: dict[str, float] = {}
    for row_id, likelihoods in measured.likelihoods.get(index, {}).items():
        chosen, rejected = likelihoods[:2]
        found[row_id] = chosen.logp / chosen.tokens - rejected.logp / rejected.tokens
    return found


def _group(rows: dict[str, Row], row_id: str) -> str:
    """The prompt of a row; the pieces of a document belong together."""
    row = rows.get(row_id) or rows.get(row_id.rpartition("/")[0])
    return row_id if row is None else row.group


def _half_at_zero(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
