"""One pass with the reference policy at the start of a preference stage."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.packing import pack, packed_length
from plumbline_trainer.engine.references import ReferenceKey, References, load_scores, save_scores
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.scoring import Scores, score_rows
from plumbline_trainer.engine.trained import policy_identity
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.adapters import adapters_disabled
from plumbline_trainer.models.policy import Policy, load_policy

START_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.5}
"""Largest |log π − log π_ref| of a response before the first step, where both are the same weights. Only the cut into
micro-batches differs, so float32 leaves rounding; bfloat16 adds up to some hundredths per token."""
CHECK_TOKENS = 192


def find_references(run: TrainingRun, policy: Policy, held_out: Sequence[Encoded]) -> References:
    """Reference log-probabilities of every row that the stage will look at.

    The reference is the stage named by the input `reference`, else the policy as the stage starts with it: with the
    adapter off, or before the first step of full fine-tuning. They are taken from storage where a former attempt left
    them. Call it before the run takes up its checkpoint.

    Raises:
        InputError: if the named reference has another tokenizer.
        Interrupted: on SIGTERM.
    """
    rows = [*(run.rows[index] for index in run.plan.visited()), *held_out]
    named = [item for item in run.context.run.inputs if item.role == "reference"]
    if named:
        return References(rows, _named_scores(run, policy, rows))
    references = References(rows, _own_scores(run, policy, rows))
    if run.state.step == 0 and run.state.path == "fast":
        gap = _gap_at_start(run, references)
        if not gap <= START_TOLERANCES[run.scorer.precision]:
            run.go_plain(f"before the first step the policy and its reference differ by {gap:.2g} instead of 0")
            references = References(rows, _own_scores(run, policy, rows))
    return references


def _own_scores(run: TrainingRun, policy: Policy, rows: Sequence[Encoded]) -> Scores:
    """Scores under the weights the stage starts with."""
    key = _key(run, policy, str(run.state.path)).digest(rows)
    return _kept(run, key, rows) or _computed(run, run.scorer, key, rows)


def _named_scores(run: TrainingRun, policy: Policy, rows: Sequence[Encoded]) -> Scores:
    """Scores under the policy of another stage, which is loaded for this pass only."""
    context = run.context
    reference = load_policy(
        context, context.input("reference"), precision=run.training.precision, device=context.device
    )
    if reference.tokenizer.digest != policy.tokenizer.digest:
        raise InputError(
            f'stage {context.run.stage}: the policy and the reference "{context.input("reference").name}" have '
            "different tokenizers or chat templates; choose a reference that was trained from the same base model"
        )
    key = _key(run, reference, "checked").digest(rows)
    return _kept(run, key, rows) or _computed(run, reference.model, key, rows)


def _key(run: TrainingRun, policy: Policy, path: str) -> ReferenceKey:
    return ReferenceKey(
        weights=policy_identity(policy),
        path=path,
        precision=run.scorer.precision,
        numerics_version=run.context.run.numerics_version,
        split=f"{run.training.tokens_per_batch}/{run.ranks.size}/{torch.get_num_threads()}",
    )


def _kept(run: TrainingRun, key: str, rows: Sequence[Encoded]) -> Scores | None:
    scores = load_scores(run.context.store, run.context.run_root, key, rows)
    # Every rank reads for itself; if one finds none, all compute.
    return None if run.ranks.any(scores is None) else scores


def _computed(run: TrainingRun, model: PreTrainedModel | Scorer, key: str, rows: Sequence[Encoded]) -> Scores:
    context = run.context

    def at_batch(done: int, batches: int) -> None:
        run.leave_if_stopped()
        if run.ranks.is_main:
            context.progress.update(run.state.step, run.plan.steps, f"reference pass, batch {done + 1} of {batches}")

    with adapters_disabled(run.scorer.model) if model is run.scorer else nullcontext():
        scores = score_rows(
            model,
            rows,
            tokens_per_batch=run.training.tokens_per_batch,
            device=run.ranks.device,
            precision=run.scorer.precision,
            ranks=run.ranks,
            at_batch=at_batch,
        )
    if run.ranks.is_main:
        save_scores(context.store, context.run_root, key, scores)
    return scores


def _gap_at_start(run: TrainingRun, references: References) -> float:
    """Largest |log π − log π_ref| of a response over a few rows of the first step."""
    rows: list[Encoded] = []
    for row in (run.rows[index] for index in run.plan.rows(0)):
        if rows and sum(packed_length(other) for other in [*rows, row]) > CHECK_TOKENS:
            break
        rows.append(row)
    batch = pack(rows, run.ranks.device)
    with torch.no_grad():
        policy = batch.sum_by_answer(run.scorer(batch))
    gap = float((policy.cpu() - references.totals(batch)).abs().max())
    return run.ranks.sum_floats({"gap": gap})["gap"] / run.ranks.size
