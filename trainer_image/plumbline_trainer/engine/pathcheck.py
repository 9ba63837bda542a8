"""Before anything is trained: does the fast path give what the plain one gives?

The fast path takes the compared rows in one batch, so that a leak from row to row shows. The plain one takes them
answer by answer, each with a backward pass of its own, so that only one answer's graph is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.heap import release_freed
from plumbline_trainer.engine.packing import PackedBatch, pack, packed_length
from plumbline_trainer.engine.scorer import Path, Scorer, recurrent_layers
from plumbline_trainer.engine.sharding import is_sharded, own_part, start_over

CHECK_TOKENS = 192
"""Tokens of the compared micro-batch: small beside one step."""
CHECK_ANSWERS = 2
"""Answers of a compared row: two share its prompt, more would show nothing else."""


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted differences between the two paths."""

    loss: float
    """Of the mean log-probability, relative to the mean absolute one or to `LEAST_MEAN`."""
    token: float
    """Of any token's log-probability, absolute."""
    values: float
    """Norm of the scalar heads' difference over the norm of what they say on the plain path. Only a few are compared,
    of either sign, so that their mean may be near zero by chance."""
    gradient: float
    """Norm of the gradients' difference over the norm of the plain gradient."""


TOLERANCES = {
    "float32": Tolerance(loss=1e-5, token=2e-3, values=1e-4, gradient=1e-3),
    "bfloat16": Tolerance(loss=0.02, token=1.0, values=0.1, gradient=0.15),
}
"""bfloat16 has 8 bits: single tokens differ by tenths, means by a percent, values and gradients by some percent. A leak
or a wrong mask moves gradients by a fifth and more."""
LEAST_MEAN = 0.1
"""Nats. Below it a mean log-probability is compared with this: where a model knows every answer by heart, what
rounding leaves is not small beside the rest."""


@dataclass(frozen=True)
class PathChoice:
    """Which way a stage goes, and why."""

    path: Path
    reason: str
    gaps: Mapping[str, float] = field(default_factory=dict)
    """Differences that were found, by name (`Tolerance`)."""


def choose_path(
    scorer: Scorer,
    rows: Sequence[Encoded],
    trainables: Mapping[str, nn.Parameter],
    *,
    tokens: int,
    ranks: Ranks,
) -> PathChoice:
    """Compare one micro-batch on both paths, log-probabilities and, where something is trained, gradients.

    The scorer must be in evaluation mode: dropout would differ. Gradients are left as they were.

    Args:
        scorer: What will score; its path is tried out and put back.
        rows: Rows the stage will see; a few are taken.
        trainables: Parameters whose gradients are compared.
        tokens: Token budget of a micro-batch.
        ranks: If any rank finds a mismatch all go the plain way.
    """
    model = scorer.model
    if (reason := recurrent_layers(model)) is not None:
        return PathChoice("plain", reason)
    if not rows:
        return PathChoice("fast", "nothing to compare")
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    sample = _sample([_cut(row) for row in rows], min(tokens, CHECK_TOKENS), window)
    before = scorer.path
    try:
        choice = _compare(scorer, sample, trainables, ranks)
    finally:
        scorer.path = before
        release_freed()
    if ranks.any(choice.path == "plain") and choice.path == "fast":
        return PathChoice("plain", "another rank found the fast path to differ", choice.gaps)
    return choice


def _sample(rows: Sequence[Encoded], budget: int, window: int | None) -> list[Encoded]:
    """At least two rows, up to the budget: the shortest of those in which something is scored, because the plain path
    takes one answer at a time. With a sliding window the longest row too, so that the window is seen."""
    taken: list[Encoded] = []
    if window is not None:
        longest = max(rows, key=packed_length)
        taken = [longest] if packed_length(longest) > window else []
    room = budget
    for row in sorted(rows, key=lambda row: (not _is_scored(row), packed_length(row))):
        if len(taken) >= 2 and packed_length(row) > room:
            break
        taken.append(row)
        room -= packed_length(row)
    return taken


def _cut(row: Encoded) -> Encoded:
    return replace(row, responses=row.responses[:CHECK_ANSWERS]) if len(row.responses) > CHECK_ANSWERS else row


def _is_scored(row: Encoded) -> bool:
    return row.score_context or any(response.reads or any(response.mask) for response in row.responses)


def _compare(
    scorer: Scorer, rows: Sequence[Encoded], trainables: Mapping[str, nn.Parameter], ranks: Ranks
) -> PathChoice:
    device = scorer.model.device
    whole = pack(rows, device)
    scorer.path = "plain"
    plain, plain_gradient = _measure(scorer, (pack([alone], device) for alone in _answers(rows)), trainables)
    scorer.path = "fast"
    try:
        fast, fast_gradient = _measure(scorer, [whole], trainables)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model may fail in any way on what it was not made for; the reason is passed on
        start_over(scorer)
        return PathChoice("plain", f"the fast path fails: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    if not len(plain):
        return PathChoice("fast", "nothing to compare")
    gaps = _value_gaps(fast, plain) if plain.dim() == 2 else _token_gaps(fast, plain)
    gaps["gradient"] = _relative_gap(fast_gradient, plain_gradient, list(trainables.values()), ranks)
    figures = ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items())
    tolerance = asdict(TOLERANCES[scorer.precision])
    # Written so that a NaN is a mismatch.
    if all(gap <= tolerance[name] for name, gap in gaps.items()):
        return PathChoice("fast", f"differences to the plain path: {figures}", gaps)
    return PathChoice("plain", f"the fast path differs from the plain one: {figures}", gaps)


def _token_gaps(fast: Tensor, plain: Tensor) -> dict[str, float]:
    """Differences of log-probabilities, [N]."""
    mean = (fast.mean() - plain.mean()).abs() / plain.abs().mean().clamp_min(LEAST_MEAN)
    return {"loss": float(mean), "token": float((fast - plain).abs().max())}


def _value_gaps(fast: Tensor, plain: Tensor) -> dict[str, float]:
    """Differences of what scalar heads say, [R, heads]."""
    # Heads that start at zero say nothing yet, on either path.
    return {"values": float((fast - plain).norm() / plain.norm().clamp_min(torch.finfo(plain.dtype).tiny))}


def _answers(rows: Sequence[Encoded]) -> Iterator[Encoded]:
    """Each answer in a row of its own; a row's context belongs to its first answer."""
    for row in rows:
        for index, response in enumerate(row.responses):
            alone = replace(row, responses=[response], score_context=row.score_context and index == 0)
            if _is_scored(alone):
                yield alone


def _measure(
    scorer: Scorer, batches: Iterable[PackedBatch], trainables: Mapping[str, nn.Parameter]
) -> tuple[Tensor, list[Tensor | None]]:
    """What is scored, answer by answer, and the gradient of a sum with a fixed random factor for each, so that no error
    cancels."""
    parameters = list(trainables.values())
    sharded = any(is_sharded(parameter) for parameter in parameters)
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    gradients: list[Tensor | None] = [None] * len(parameters)
    for batch in batches:
        with torch.set_grad_enabled(bool(parameters)):
            parts = _by_answer(scorer(batch), batch)
        found += [part.detach() for part in parts]
        # One draw for each answer: how many numbers are drawn at once changes them.
        factors = [torch.randn(part.shape, generator=generator).to(part.device) for part in parts]
        if not parameters or not any(part.numel() for part in parts):
            continue
        loss = torch.stack([(factor * part).sum() for factor, part in zip(factors, parts, strict=True)]).sum()
        if sharded:
            torch.autograd.backward(loss)
        else:
            more = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients = [_sum(before, own) for before, own in zip(gradients, more, strict=True)]
    if sharded:
        gradients = [None if parameter.grad is None else own_part(parameter.grad) for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
    return torch.cat(found) if found else torch.zeros(0), gradients


def _by_answer(scores: Tensor, batch: PackedBatch) -> list[Tensor]:
    """What a scorer says of a batch, [N] or of scalar heads [R, heads], for each answer that has some; with a row's
    first one stands what was scored around it."""
    if scores.dim() == 2:
        ranges = [[answer.read] for answer in batch.answers]
    else:
        contexts = {context.row: context.scored for context in batch.contexts}
        ranges = [[answer.scored, contexts.pop(answer.row, range(0))] for answer in batch.answers]
    parts = [torch.cat([scores[own.start : own.stop] for own in of_answer]) for of_answer in ranges]
    return [part for part in parts if len(part)]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


def _relative_gap(
    fast: Sequence[Tensor | None], plain: Sequence[Tensor | None], parameters: Sequence[nn.Parameter], ranks: Ranks
) -> float:
    """‖fast − plain‖ / ‖plain‖, of sharded parameters over all ranks."""
    difference = total = 0.0
    sharded = any(is_sharded(parameter) for parameter in parameters)
    for one, other, parameter in zip(fast, plain, parameters, strict=True):
        if one is None and other is None:
            continue
        if sharded and not is_sharded(parameter) and not ranks.is_main:
            continue  # Every rank has the whole of it.
        shape = one if other is None else other
        assert shape is not None
        a = torch.zeros_like(shape) if one is None else one
        b = torch.zeros_like(shape) if other is None else other
        scale = float(ranks.size if is_sharded(parameter) else 1)
        difference += float(((a - b).double() / scale).square().sum())
        total += float((b.double() / scale).square().sum())
    if sharded:
        # All ranks have scored the same rows, so that gradients that were summed are larger by their number.
        sums = ranks.sum_floats({"difference": difference, "total": total})
        difference, total = sums["difference"], sums["total"]
    if not difference:
        return 0.0
    return float((difference / total) ** 0.5) if total else float("inf")
