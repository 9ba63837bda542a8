"""One pass with the reference policy at the start of a preference stage."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.packing import pack, packed_length
from plumbline_trainer.engine.pathcheck import choose_path
from plumbline_trainer.engine.reference_cache import ReferenceCache, ReferenceKey
from plumbline_trainer.engine.references import References, by_prompt, row_keys, totals_by_key
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.engine.sharding import shard
from plumbline_trainer.engine.trained import policy_identity
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.adapters import adapters_disabled
from plumbline_trainer.models.dtypes import widens
from plumbline_trainer.models.merging import starts_of
from plumbline_trainer.models.policy import Policy, load_policy

START_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.5}
"""Largest |log π − log π_ref| of a response before the first step, where both are the same weights. Only the cut into
micro-batches differs, so float32 leaves rounding; bfloat16 adds up to some hundredths per token."""
CHECK_TOKENS = 192


def find_references(
    run: TrainingRun, policy: Policy, held_out: Sequence[Encoded], further: Sequence[Encoded] = ()
) -> References:
    """Reference log-probabilities of every row that the stage will look at.

    The reference is the stage named by the input `reference`, else the policy as the stage starts with it: with the
    adapter off, or before the first step of full fine-tuning. What any stage of the namespace has computed before is
    taken from storage. Call it before the run takes up its checkpoint.

    Args:
        run: Of the stage; its plan says which training rows are looked at.
        policy: As the stage starts with it.
        held_out: Rows of evaluations.
        further: Other rows that the objective needs.

    Raises:
        InputError: if the named reference has another tokenizer.
        Interrupted: on SIGTERM.
    """
    rows = [*(run.rows[index] for index in run.plan.visited()), *held_out, *further]
    if any(item.role == "reference" for item in run.context.run.inputs):
        return _named_references(run, policy, rows)
    references = _references(run, policy, run.scorer, rows)
    if run.state.step == 0 and run.state.path == "fast":
        gap = _gap_at_start(run, references)
        if not gap <= START_TOLERANCES[run.scorer.precision]:
            run.go_plain(f"before the first step the policy and its reference differ by {gap:.2g} instead of 0")
            references = _references(run, policy, run.scorer, rows)
    return references


def _named_references(run: TrainingRun, policy: Policy, rows: Sequence[Encoded]) -> References:
    """Under the policy of another stage, which is loaded for this pass only."""
    reference, scorer = _load_reference(run, policy, "reference", rows)
    return _references(run, reference, scorer, rows)


def kl_reference(run: TrainingRun, policy: Policy) -> Scorer | None:
    """The policy of the input `kl.reference`, which stays in memory beside the one that is trained; None without one.

    Both take the same path.

    Raises:
        InputError: if it has another tokenizer or vocabulary.
    """
    if not any(item.role == "kl.reference" for item in run.context.run.inputs):
        return None
    loaded, scorer = _load_reference(
        run, policy, "kl.reference", [run.rows[index] for index in run.plan.rows(0)], keeps_head=True
    )
    sizes = [int(model.config.get_text_config().vocab_size) for model in (policy.model, loaded.model)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"stage {run.context.run.stage}: the policy has {sizes[0]:,} tokens and the reference of kl {sizes[1]:,}; "
            "choose a reference that was trained from the same base model"
        )
    if scorer.path == "plain" and run.scorer.path == "fast" and run.state.step == 0:
        run.go_plain("the reference of kl cannot take the fast path")
    scorer.path = run.scorer.path
    return scorer.requires_grad_(False)


def _load_reference(
    run: TrainingRun, policy: Policy, role: str, rows: Sequence[Encoded], *, keeps_head: bool = False
) -> tuple[Policy, Scorer]:
    """The policy of an input and a scorer around it, with its path chosen; sharded where the run is.

    With `keeps_head` every rank keeps all of its output head: a divergence reads that of the reference while the
    policy's weights are put together, and where those are trained once more in the backward pass.
    """
    context, training = run.context, run.training
    item = context.input(role)
    shards = training.sharding == "full" and run.ranks.size > 1
    device = "cpu" if shards else context.device
    stored = not shards and widens(training.precision, device=context.device.type)
    reference = load_policy(context, item, precision=training.precision, device=device, stored=stored)
    if reference.tokenizer.digest != policy.tokenizer.digest:
        raise InputError(
            f'stage {context.run.stage}: the policy and the reference "{item.name}" have '
            "different tokenizers or chat templates; choose a reference that was trained from the same base model"
        )
    scorer = Scorer(reference.model, precision=run.scorer.precision)
    scorer.eval()
    if shards:
        head = scorer.model.get_output_embeddings()
        shard(scorer, run.ranks, kept=list(head.parameters()) if keeps_head and head is not None else ())
    choice = choose_path(scorer, rows, {}, tokens=training.token_budget, ranks=run.ranks)
    scorer.path = choice.path
    level = context.log.info if choice.path == "fast" else context.log.warning
    level("reference: %s path: %s", choice.path, choice.reason)
    return reference, scorer


def _references(run: TrainingRun, policy: Policy, scorer: Scorer, rows: Sequence[Encoded]) -> References:
    """Totals from storage, and a pass over what is not there."""
    key = ReferenceKey(
        weights=_identity(policy, scorer),
        path=scorer.path,
        precision=scorer.precision,
        device=run.ranks.device.type,
        split=f"{run.training.token_budget}/{run.ranks.size}/{torch.get_num_threads()}",
    )
    cache = ReferenceCache(run.context, key)
    wanted = list(dict.fromkeys(key for row in rows for key in row_keys(row)))
    found = _agreed(run, cache.find(wanted) if run.ranks.is_main else {}, wanted)
    missing = by_prompt(rows, found, run.training.token_budget)
    computed = _computed(run, scorer, missing) if missing else {}
    if run.ranks.is_main:
        said = f"reference values: {len(found):,} of {len(wanted):,} responses found in storage"
        run.context.log.info("%s", said)
        cache.keep(computed, found | computed)
    return References.known(found | computed)


def _identity(policy: Policy, scorer: Scorer) -> str:
    """Of the weights that the reference computes with.

    Where modules are trained whole, they and the norms are held as float32 also while they have their first values,
    and what comes out of a model in bfloat16 or in four bits is then rounded less.
    """
    rounded = scorer.precision != "float32" or policy.quantization is not None
    whole = sorted(starts_of(scorer.model)) if rounded else []
    return "/".join([policy_identity(policy), *(["float32", *whole] if whole else [])])


def _agreed(run: TrainingRun, found: dict[bytes, Tensor], wanted: Sequence[bytes]) -> dict[bytes, Tensor]:
    """What rank 0 found, on every rank: others may look a moment later and see more."""
    if run.ranks.size == 1:
        return found
    values = torch.zeros(2, len(wanted), device=run.ranks.device)
    for index, key in enumerate(wanted):
        if key in found:
            values[0, index], values[1, index] = found[key], 1.0
    run.ranks.sum_tensors([values])
    values = values.cpu()
    return {key: values[0, index].clone() for index, key in enumerate(wanted) if values[1, index] > 0}


def _computed(run: TrainingRun, scorer: Scorer, rows: Sequence[Encoded]) -> dict[bytes, Tensor]:
    context = run.context

    def at_batch(done: int, batches: int) -> None:
        run.leave_if_stopped()
        if run.ranks.is_main:
            context.progress.update(run.state.step, run.plan.steps, f"reference pass, batch {done + 1} of {batches}")

    with adapters_disabled(scorer.model) if scorer is run.scorer else nullcontext():
        scores = score_rows(
            scorer,
            rows,
            tokens_per_batch=run.training.token_budget,
            device=run.ranks.device,
            precision=scorer.precision,
            ranks=run.ranks,
            at_batch=at_batch,
        )
    return totals_by_key(rows, scores)


def _gap_at_start(run: TrainingRun, references: References) -> float:
    """Largest |log π − log π_ref| of a response over a few rows of the first step."""
    rows: list[Encoded] = []
    for row in (run.rows[index] for index in run.plan.own_rows(0)):
        if rows and sum(packed_length(other) for other in [*rows, row]) > CHECK_TOKENS:
            break
        rows.append(row)
    batch = pack(rows, run.ranks.device)
    with torch.no_grad():
        policy = batch.sum_by_answer(run.scorer(batch))
    gap = float((policy.cpu() - references.totals(batch)).abs().max())
    return run.ranks.sum_floats({"gap": gap})["gap"] / run.ranks.size
