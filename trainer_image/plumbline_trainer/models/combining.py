"""Several models become one, weight by weight: linear, SLERP, TIES and DARE on tensors of one name.

All in float64, in blocks, with sums in a fixed order and one rounding at the end, so that the result is the same bits
on every machine. θᵢ are the models' weights, wᵢ their shares (which add up to 1), θ₀ the base, τᵢ = θᵢ − θ₀.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plumbline_trainer.models.merging import fold_sum, round_to

_BLOCK = 1 << 20
"""Elements that are in float64 at a time, of every model."""
PARALLEL = 1e-4
"""Angle in radians below which SLERP and the straight line differ by less than float32 can hold (θ²/8)."""


@dataclass(frozen=True)
class Recipe:
    """How models are combined."""

    method: str
    shares: tuple[float, ...]
    """wᵢ in the order of the models; they add up to 1."""
    t: float = 0.5
    density: float = 1.0
    scale: float = 1.0
    seed: int = 0


@dataclass
class Account:
    """What combining did, over all tensors."""

    tensors: int = 0
    straight: int = 0
    """Tensors that SLERP combined on the straight line, because they are nearly parallel."""
    touched: int = 0
    """Weights that any model changes after trimming or dropping."""
    conflicts: int = 0
    """Of those, weights that models want to move in opposite directions."""
    rounding_squared: float = 0.0
    change_squared: float = 0.0

    @property
    def lost_part(self) -> float:
        """‖rounding‖/‖change from the base‖."""
        return math.sqrt(self.rounding_squared / self.change_squared) if self.change_squared else 0.0


def combine(
    recipe: Recipe, name: str, models: Sequence[Tensor], base: Tensor | None, dtype: torch.dtype, account: Account
) -> Tensor:
    """One tensor of the merged model, rounded once.

    Args:
        recipe: what to do.
        name: of the tensor; DARE draws by it.
        models: the tensor in every model, equal shapes.
        base: the tensor in the base, for TIES and DARE.
        dtype: storage type of the result.
        account: takes what was done.
    """
    flat = [model.reshape(-1) for model in models]
    start = None if base is None else base.reshape(-1)
    result = torch.empty(flat[0].numel(), dtype=dtype)
    account.tensors += 1
    factors = list(recipe.shares)
    if recipe.method == "slerp":
        factors, is_straight = slerp_factors(flat[0], flat[1], recipe.t)
        account.straight += is_straight
    kept: list[Tensor] = []
    if start is not None and recipe.method == "ties":
        kept = [largest(tensor, start, recipe.density) for tensor in flat]
    draws = [Draws(recipe.seed, position, name) for position in range(len(flat))]
    for begin in range(0, len(result), _BLOCK):
        part = slice(begin, min(begin + _BLOCK, len(result)))
        blocks = [tensor[part].double() for tensor in flat]
        if start is None:
            exact = weighted_sum(blocks, factors)
        else:
            origin = start[part].double()
            changes = [block - origin for block in blocks]
            if recipe.method == "ties":
                changes = [torch.where(mask[part], change, 0.0) for mask, change in zip(kept, changes, strict=True)]
            else:
                changes = [drop(change, draw, recipe.density) for change, draw in zip(changes, draws, strict=True)]
            agreed, conflicts = elect(changes, factors)
            account.conflicts += int(conflicts.sum())
            account.touched += int(torch.stack([change != 0 for change in changes]).any(dim=0).sum())
            merged = weighted_sum(changes, factors) if recipe.method == "dareLinear" else agreed
            change = merged * recipe.scale
            exact = origin + change
            account.change_squared += float(change.square().sum())
        rounded = round_to(exact, dtype)
        account.rounding_squared += float((rounded.double() - exact).square().sum())
        result[part] = rounded
    return result.reshape(models[0].shape)


def weighted_sum(tensors: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Σᵢ wᵢ·xᵢ, in order."""
    total = tensors[0] * factors[0]
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        total += tensor * factor
    return total


def slerp_factors(first: Tensor, second: Tensor, t: float) -> tuple[list[float], bool]:
    """Factors of two flat tensors on the arc between them, and whether the straight line is taken instead.

    (sin((1−t)φ)·θ₁ + sin(tφ)·θ₂)/sin φ with φ the angle between θ₁ and θ₂ (Shoemake 1985); (1−t)·θ₁ + t·θ₂ where they
    are nearly parallel, opposite or zero. φ = 2·atan2(‖u−v‖, ‖u+v‖) of the unit vectors, which is exact for small ones.
    """
    lengths = [math.sqrt(_total([tensor], lambda x: x.square())) for tensor in (first, second)]
    if min(lengths) == 0:
        return [1 - t, t], True
    one, two = lengths
    apart = math.sqrt(_total([first, second], lambda x, y: (x / one - y / two).square()))
    along = math.sqrt(_total([first, second], lambda x, y: (x / one + y / two).square()))
    angle = 2 * math.atan2(apart, along)
    if math.sin(angle) < PARALLEL:
        return [1 - t, t], True
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)], False


def _total(tensors: Sequence[Tensor], function: Callable[..., Tensor]) -> float:
    """Sum of a function over flat tensors, block by block."""
    sums = [
        fold_sum(function(*(tensor[begin : begin + _BLOCK].double() for tensor in tensors)))
        for begin in range(0, tensors[0].numel(), _BLOCK)
    ]
    return math.fsum(float(value) for value in sums)


def largest(tensor: Tensor, start: Tensor, density: float) -> Tensor:
    """Which ⌊density·n⌋ changes |τ| are largest (Yadav et al. 2023, trim), as a mask; of equal ones the first."""
    count = int(density * tensor.numel())
    if count == tensor.numel():
        return torch.ones(tensor.numel(), dtype=torch.bool)
    if count == 0:
        return torch.zeros(tensor.numel(), dtype=torch.bool)
    sizes = (tensor.double() - start.double()).abs_()
    ordered = sizes.numpy().copy()
    ordered.partition(len(ordered) - count)
    threshold = float(ordered[len(ordered) - count])
    del ordered
    mask = sizes > threshold
    if threshold == 0:
        return mask
    room = count - int(mask.sum())
    ties = (sizes == threshold).nonzero().squeeze(1)[:room]
    mask[ties] = True
    return mask


def elect(changes: Sequence[Tensor], factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Elect a sign for every weight and average the changes that agree with it (Yadav et al. 2023).

    γ = sgn Σᵢ wᵢτᵢ, + where that is 0; τ = Σ{i: sgn τᵢ = γ} wᵢτᵢ / Σ{i: sgn τᵢ = γ} wᵢ, 0 where none agrees.

    Returns:
        τ, and a mask of weights at which a change of the other sign was left out.
    """
    positive = weighted_sum(changes, factors) >= 0
    total = torch.zeros_like(changes[0])
    share = torch.zeros_like(changes[0])
    conflicts = torch.zeros_like(positive)
    for change, factor in zip(changes, factors, strict=True):
        agrees = torch.where(positive, change > 0, change < 0)
        conflicts |= (change != 0) & ~agrees
        total += torch.where(agrees, change * factor, 0.0)
        share += agrees.to(share.dtype) * factor
    return torch.where(share > 0, total / share, 0.0), conflicts


class Draws:
    """Uniform numbers of one tensor of one model: a function of seed, place among the models and name.

    Built from raw bits, because the streams of the libraries' distributions may change between versions.
    """

    def __init__(self, seed: int, position: int, name: str) -> None:
        key = int.from_bytes(hashlib.sha256(f"dare/{seed}/{position}/{name}".encode()).digest()[:16], "big")
        self._bits = np.random.Philox(key=key)

    def next(self, count: int) -> Tensor:
        """The next numbers of [0, 1), float64."""
        raw = self._bits.random_raw(count)
        return torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def drop(change: Tensor, draws: Draws, density: float) -> Tensor:
    """Drop changes at random and rescale the rest (Yu et al. 2024): τ·m/density with m ~ Bernoulli(density)."""
    return torch.where(draws.next(change.numel()) < density, change / density, 0.0)
