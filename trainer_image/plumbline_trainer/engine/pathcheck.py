"""Before anything is trained: does the fast path give what the plain one gives?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.packing import PackedBatch, pack, packed_length
from plumbline_trainer.engine.scorer import Path, Scorer, recurrent_layers

CHECK_TOKENS = 192
"""Tokens of the compared micro-batch: small beside one step."""


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted differences between the two paths."""

    loss: float
    """Of the mean log-probability or value, relative to the mean absolute one."""
    token: float
    """Of any token's log-probability, or of any value, absolute."""
    gradient: float
    """Norm of the gradients' difference over the norm of the plain gradient."""


TOLERANCES = {
    "float32": Tolerance(loss=1e-5, token=2e-3, gradient=1e-3),
    "bfloat16": Tolerance(loss=0.02, token=1.0, gradient=0.15),
}
"""bfloat16 has 8 bits: single tokens differ by tenths, means by a percent. A leak or a wrong mask is far above."""


@dataclass(frozen=True)
class PathChoice:
    """Which way a stage goes, and why."""

    path: Path
    reason: str
    loss_gap: float = 0.0
    gradient_gap: float = 0.0


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
    batch = pack(_sample(rows, min(tokens, CHECK_TOKENS), window), model.device)
    before = scorer.path
    try:
        choice = _compare(scorer, batch, trainables)
    finally:
        scorer.path = before
    if ranks.any(choice.path == "plain") and choice.path == "fast":
        return PathChoice("plain", "another rank found the fast path to differ", choice.loss_gap, choice.gradient_gap)
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


def _is_scored(row: Encoded) -> bool:
    return row.score_context or any(response.reads or any(response.mask) for response in row.responses)


def _compare(scorer: Scorer, batch: PackedBatch, trainables: Mapping[str, nn.Parameter]) -> PathChoice:
    scorer.path = "plain"
    plain, plain_gradient = _measure(scorer, batch, trainables)
    scorer.path = "fast"
    try:
        fast, fast_gradient = _measure(scorer, batch, trainables)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model may fail in any way on what it was not made for; the reason is passed on
        return PathChoice("plain", f"the fast path fails: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    if not len(plain):
        return PathChoice("fast", "nothing to compare")
    loss_gap = float((fast.mean() - plain.mean()).abs() / plain.abs().mean().clamp_min(1e-6))
    token_gap = float((fast - plain).abs().max())
    gradient_gap = _relative_gap(fast_gradient, plain_gradient)
    tolerance = TOLERANCES[scorer.precision]
    figures = f"loss {loss_gap:.1e}, token {token_gap:.1e}, gradient {gradient_gap:.1e}"
    # Written so that a NaN is a mismatch.
    if loss_gap <= tolerance.loss and token_gap <= tolerance.token and gradient_gap <= tolerance.gradient:
        return PathChoice("fast", f"differences to the plain path: {figures}", loss_gap, gradient_gap)
    return PathChoice("plain", f"the fast path differs from the plain one: {figures}", loss_gap, gradient_gap)


def _measure(
    scorer: Scorer, batch: PackedBatch, trainables: Mapping[str, nn.Parameter]
) -> tuple[Tensor, list[Tensor | None]]:
    """What is scored and the gradient of a sum with a fixed random factor for each, so that no error cancels."""
    parameters = list(trainables.values())
    if not parameters:
        with torch.no_grad():
            return scorer(batch), []
    scores = scorer(batch)
    if not len(scores):
        return scores.detach(), []
    factors = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0)).to(scores.device)
    gradients = torch.autograd.grad((factors * scores).sum(), parameters, allow_unused=True)
    return scores.detach(), list(gradients)


def _relative_gap(fast: Sequence[Tensor | None], plain: Sequence[Tensor | None]) -> float:
    difference = total = 0.0
    for one, other in zip(fast, plain, strict=True):
        if one is None and other is None:
            continue
        shape = one if other is None else other
        assert shape is not None
        a = torch.zeros_like(shape) if one is None else one
        b = torch.zeros_like(shape) if other is None else other
        difference += float((a - b).double().square().sum())
        total += float(b.double().square().sum())
    if not difference:
        return 0.0
    return float((difference / total) ** 0.5) if total else float("inf")
