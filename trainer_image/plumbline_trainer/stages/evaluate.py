"""Evaluate: measure a policy, and a baseline beside it, on held-out rows."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from plumbline_api.evaluation import Evaluate
from plumbline_api.stagerun import StageInput

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.data.rows import Message
from plumbline_trainer.engine.distributed import Ranks, joined_ranks
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.errors import InputError, Interrupted
from plumbline_trainer.evaluation.judges import Question, Verdict, judge_by_model, judge_by_reward, judge_by_rule
from plumbline_trainer.evaluation.measuring import (
    Measured,
    SuiteRows,
    choose_prompts,
    choose_rows,
    longest_sequence,
    measure,
)
from plumbline_trainer.evaluation.suites import SuiteResult, compare, important_first, metric_names
from plumbline_trainer.models.ancestry import Ancestry, trace
from plumbline_trainer.models.policy import load_policy
from plumbline_trainer.models.reward import load_reward_model

if TYPE_CHECKING:
    from plumbline_trainer.data.encode import Encoded
    from plumbline_trainer.engine.scoring import Scores

REPORT = "report.json"
REPORT_VERSION = 1


def run(context: StageContext) -> StageOutput | None:
    """Read the rows, let both models work on them, judge, and write every figure with its records."""
    parameters: dict[str, Any] = dict(context.run.parameters)
    seed = int(parameters.pop("seed", 0))
    evaluate = Evaluate.model_validate(parameters)
    policy_input, baseline_input = context.input("model"), context.input("baseline")
    with joined_ranks(context.rank, context.world_size, context.device) as ranks:
        # Read
        suites = _read_suites(context, evaluate, seed)

        # Work
        policy = _measure(context, policy_input, evaluate, suites, seed, ranks, part=0)
        same = _identity(policy_input) == _identity(baseline_input)
        baseline = policy if same else _measure(context, baseline_input, evaluate, suites, seed, ranks, part=1)

        # Judge and compare
        def judge(item: SuiteRows, questions: Sequence[Question]) -> list[Verdict]:
            return _judge(context, evaluate, item, questions, ranks)

        results = [
            compare(item, metric, policy, baseline, judge, confidence=evaluate.confidence, seed=seed)
            for item, metric in zip(suites, metric_names(evaluate.suites), strict=True)
        ]
    _mark_in_sample(context, trace(context, policy_input), suites, results)
    if not context.is_main:
        return None

    # Report
    metrics = important_first(results)
    folder = context.scratch / "output"
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "version": REPORT_VERSION,
        "policy": _named(policy_input),
        "baseline": _named(baseline_input),
        "confidence": evaluate.confidence,
        "precision": evaluate.precision,
        "seed": seed,
        "metrics": metrics,
        "suites": [result.document for result in results],
    }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=1)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    context.progress.update(1000, 1000, "evaluated", metrics)
    tokens = policy.tokens + (0 if same else baseline.tokens)
    return StageOutput(
        folder=folder,
        kind="report",
        meta={"policy": _named(policy_input), "baseline": _named(baseline_input)},
        metrics=metrics,
        tokens=tokens,
    )


def _read_suites(context: StageContext, evaluate: Evaluate, seed: int) -> list[SuiteRows]:
    suites: list[SuiteRows] = []
    for index, suite in enumerate(evaluate.suites):
        value = suite.value
        source = context.input(f"suites.{index}.dataset")
        rows = load_rows(context, source, value.split)
        asks = suite.win_rate or suite.samples
        chosen = choose_rows(rows, value.limit, seed) if asks is None else choose_prompts(rows, asks.prompts, seed)
        if not chosen:
            raise InputError(
                f'suites[{index}].{suite.choice}: the {value.split} split of dataset "{source.name}" has no rows. '
                f"Hold some out with split.{value.split}, set role: test, or name another split"
            )
        suites.append(SuiteRows(index, suite, chosen))
    return suites


def _measure(
    context: StageContext,
    item: StageInput,
    evaluate: Evaluate,
    suites: Sequence[SuiteRows],
    seed: int,
    ranks: Ranks,
    *,
    part: int,
) -> Measured:
    """Load one of the two models and let it work; nothing keeps it afterwards."""
    _free(context)

    def at_share(share: float) -> None:
        # With several ranks they would have to agree to stop; an evaluation is short and starts again.
        if context.stop.requested and context.world_size == 1:
            raise Interrupted(message="stopped; the evaluation starts again from its beginning")
        context.progress.update(round(500 * (part + min(share, 1.0))), 1000, f"{item.name}: {share:.0%} measured")

    context.progress.update(500 * part, 1000, f"loading {item.name}")
    policy = load_policy(context, item, precision=evaluate.precision, device=context.device)
    measured = measure(
        policy,
        item.name,
        suites,
        seed=seed,
        tokens_per_batch=evaluate.tokens_per_batch,
        precision=evaluate.precision,
        ranks=ranks,
        at_share=at_share,
    )
    if measured.path:
        level = context.log.info if measured.path == "fast" else context.log.warning
        level("%s: %s path: %s", item.name, measured.path, measured.path_reason)
    return measured


def _judge(
    context: StageContext, evaluate: Evaluate, item: SuiteRows, questions: Sequence[Question], ranks: Ranks
) -> list[Verdict]:
    suite = item.suite.win_rate
    assert suite is not None
    if suite.judge.rule is not None:
        return judge_by_rule(suite.judge.rule, questions)
    _free(context)
    if suite.judge.stage is not None:
        return _judge_by_reward(context, evaluate, item, questions, ranks)
    assert suite.judge.model is not None
    context.progress.update(1000, 1000, f"asking the judge {suite.judge.model.source}")
    judge = load_policy(
        context, context.input(f"suites.{item.index}.judge"), precision=evaluate.precision, device=context.device
    )

    def score(rows: Sequence[Encoded]) -> Scores:
        return score_rows(
            judge.model,
            rows,
            tokens_per_batch=evaluate.tokens_per_batch,
            device=context.device,
            precision=evaluate.precision,
            ranks=ranks,
        )

    longest = longest_sequence(judge)
    return judge_by_model(suite.judge.model, judge.tokenizer, score, questions, max_length=longest)


def _judge_by_reward(
    context: StageContext, evaluate: Evaluate, item: SuiteRows, questions: Sequence[Question], ranks: Ranks
) -> list[Verdict]:
    source = context.input(f"suites.{item.index}.judge")
    context.progress.update(1000, 1000, f"asking the reward model {source.name}")
    judge = load_reward_model(
        context,
        source,
        precision=evaluate.precision,
        device=context.device,
        tokens_per_batch=evaluate.tokens_per_batch,
    )
    prompts = {row.id: row.prompt for row in item.rows}
    dialogues = [
        (*prompts[question.row_id], Message("assistant", answer))
        for question in questions
        for answer in (question.policy, question.baseline)
    ]
    rewards = judge.score(dialogues, ranks=ranks).mean(dim=1).view(-1, 2)
    return judge_by_reward([(policy, baseline) for policy, baseline in rewards.tolist()])


def _mark_in_sample(
    context: StageContext, ancestry: Ancestry, suites: Sequence[SuiteRows], results: Sequence[SuiteResult]
) -> None:
    """Mark suites whose rows or judge took part in the policy's training: their figures flatter it."""
    for item, result in zip(suites, results, strict=True):
        reasons = []
        if ancestry.learned_from(context.input(f"suites.{item.index}.dataset"), item.suite.value.split):
            reasons.append("dataset")
        judge = next((i for i in context.run.inputs if i.role == f"suites.{item.index}.judge"), None)
        if judge is not None and (judge.digest in ancestry.models or _identity(judge) in ancestry.outputs):
            reasons.append("judge")
        if reasons:
            result.document["inSample"] = reasons
            what = " and ".join(reasons)
            context.log.warning("%s: the %s took part in training; the figure is in-sample", result.kind, what)


def _identity(item: StageInput) -> tuple[str | None, ...]:
    if item.fingerprint is not None:
        return item.stage_type, item.fingerprint
    return item.uri, item.digest


def _named(item: StageInput) -> dict[str, Any]:
    found = {"name": item.name, "type": item.stage_type, "fingerprint": item.fingerprint, "uri": item.uri}
    return {key: value for key, value in found.items() if value is not None}


def _free(context: StageContext) -> None:
    """Give the memory of a model back before the next one is loaded."""
    gc.collect()
    if context.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
