"""Merging adapters into weights: pure functions on tensors.

One delta at a time, in order of training: W' = round(W₆₄ + s·Σₖ bₖ⊗aₖ), in float64 and with one rounding to the type
in which the weights are stored. The sum over the rank is taken term by term with separate multiplications and
additions, never by a matrix product of a BLAS: those sum in an order that depends on processor and thread count, and
one weight in a hundred million would then round differently from one machine to the next. DoRA's row lengths are sums
of squares taken by halves, for the same reason. Products of two float32 factors are exact in float64, so that a fused
multiply-add gives the same bits as two steps.

Weights are merged several at a time, each by one thread: what is too small for torch to split needs no thread to wake.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from plumbline_api.errors import InputError
from torch import Tensor

START_PREFIX = "start_"
"""Buffers with this prefix hold what a module that is trained whole started from."""
_CHUNK = (1 << 15) - 1
"""Elements per block: large enough to hide the cost of a call, small enough to stay in the cache, and just below what
torch splits among threads."""
_AT_ONCE = 8
"""Most weights that are merged at a time: each takes its memory twice until it is put in its place."""
LOST_PART_WARNING = 0.3
"""Share of a delta that may be lost by rounding before people are warned."""


@dataclass(frozen=True)
class Delta:
    """A low-rank change of one weight: W + scale · B·A; with a magnitude, m·(W + scale·B·A)/‖W + scale·B·A‖ by rows."""

    a: Tensor
    """(rank, in), float32."""
    b: Tensor
    """(out, rank), float32."""
    scale: float
    """alpha/rank; alpha/√rank where it was trained so."""
    transposed: bool = False
    """Whether the weight is stored as (in, out), as GPT-2's Conv1D does."""
    magnitude: Tensor | None = None
    """(out), float32: the trained length of every output's weights (DoRA)."""


@dataclass
class LostPart:
    """How much of the deltas rounding took away, over all weights that they change."""

    lost_squared: float = 0.0
    delta_squared: float = 0.0
    unchanged: int = 0
    weights: int = 0

    def add(self, before: Tensor, change: Tensor, after: Tensor) -> None:
        """Count weights that were to change by `change` (float64) and became `after`."""
        kept = after.double().sub_(before)
        self.unchanged += kept.numel() - int(torch.count_nonzero(kept))
        self.weights += kept.numel()
        self.delta_squared += float(change.square().sum())
        self.lost_squared += float(kept.sub_(change).square_().sum())

    def include(self, other: LostPart) -> None:
        """Count what was counted elsewhere."""
        self.lost_squared += other.lost_squared
        self.delta_squared += other.delta_squared
        self.unchanged += other.unchanged
        self.weights += other.weights

    @property
    def ratio(self) -> float:
        """‖lost‖/‖Δ‖; 0 where the delta is nothing."""
        return math.sqrt(self.lost_squared / self.delta_squared) if self.delta_squared > 0 else 0.0

    @property
    def unchanged_share(self) -> float:
        """Share of the touched weights that hold the same value after merging."""
        return self.unchanged / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Adapter:
    """The deltas of one trained adapter by the name of the module they change."""

    deltas: dict[str, Delta]
    rank: int
    alpha: float
    targets: tuple[str, ...] = field(default=())
    saved: dict[str, Tensor] = field(default_factory=dict)
    """Weights that were trained whole beside the factors, float32, by their name in the model."""


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 values to a storage type once, to nearest, ties to even.

    torch rounds float64 to bfloat16 by way of float32, which is two roundings; here the bits are rounded directly.
    """
    if dtype is torch.bfloat16:
        bits = values.contiguous().view(torch.int64)
        odd = (bits >> 45) & 1  # bfloat16 keeps 7 of float64's 52 fraction bits.
        rounded = ((bits + ((1 << 44) - 1) + odd) >> 45) << 45
        values = torch.where(torch.isfinite(values), rounded.view(torch.float64), values)
    return values.to(dtype)


def fold_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension by adding halves to each other: the same bits everywhere."""
    while (width := values.shape[-1]) > 1:
        half = (width + 1) // 2
        folded = values[..., :half].clone()
        folded[..., : width - half] += values[..., half:]
        values = folded
    return values.squeeze(-1)


def merge_delta(weight: Tensor, delta: Delta, dtype: torch.dtype, lost: LostPart | None = None) -> Tensor:
    """The weight with a delta added, rounded once to `dtype`.

    Args:
        weight: (out, in), or (in, out) where the delta says transposed; any floating-point type, on the CPU.
        delta: what to add.
        dtype: storage type of the result.
        lost: takes the part of the delta that rounding took away, if given.

    Raises:
        InputError: if shapes do not fit or the result is not finite.
    """
    if delta.transposed:
        straight = Delta(delta.a, delta.b, delta.scale, magnitude=delta.magnitude)
        return merge_delta(weight.T, straight, dtype, lost).T.contiguous()
    rows, columns = delta.b.shape[0], delta.a.shape[1]
    if weight.shape != (rows, columns):
        raise InputError(
            f"an adapter of shape {rows}×{columns} does not fit weights of shape "
            f"{'×'.join(map(str, weight.shape))}: it was trained on another model"
        )
    b64, a64 = delta.b.detach().double().contiguous(), delta.a.detach().double().contiguous()
    m64 = None if delta.magnitude is None else delta.magnitude.detach().double()
    merged = torch.empty((rows, columns), dtype=dtype)
    step = max(1, _CHUNK // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        before = weight[part].detach().double()
        change = torch.zeros_like(before)
        for k in range(a64.shape[0]):
            change.addcmul_(b64[part, k, None], a64[k])
        change.mul_(delta.scale)
        exact = before + change
        if m64 is not None:
            exact *= (m64[part] / fold_sum(exact.square()).sqrt())[:, None]
        after = round_to(exact, dtype)
        _check_finite(after)
        merged[part] = after
        if lost is not None:
            lost.add(before, change if m64 is None else exact - before, after)
    return merged


def _check_finite(weights: Tensor) -> None:
    # NaN and infinity show in the sum, which is a quarter of the work; a sum that overflows is looked at again.
    if not math.isfinite(float(weights.sum())) and not bool(torch.isfinite(weights).all()):
        raise InputError("merging gives weights that are not finite: training diverged. Lower the learning rate")


@torch.no_grad()
def merge_into(model: torch.nn.Module, adapter: Adapter, dtype: torch.dtype) -> LostPart:
    """Add an adapter to a model in place, a few weights at a time. The model is on the CPU in its storage type.

    Raises:
        InputError: if the adapter names modules that the model does not have.
    """
    modules = dict(model.named_modules())
    lost = LostPart()
    changes: dict[int, tuple[Tensor, list[Delta]]] = {}
    for name, delta in sorted(adapter.deltas.items()):
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise InputError(f'the adapter changes "{name}", which the model does not have: it was trained on another')
        changes.setdefault(id(weight), (weight, []))[1].append(delta)  # Modules may share a weight.
    jobs = (_merging(weight.data, deltas, dtype) for weight, deltas in changes.values())
    for (weight, _), (merged, own) in zip(changes.values(), _at_once(jobs), strict=True):
        weight.data = merged
        lost.include(own)
    seen: set[int] = set()
    for name, trained in sorted(adapter.saved.items()):
        owner, _, part = name.rpartition(".")
        weight = getattr(modules.get(owner), part, None)
        if weight is None or weight.shape != trained.shape:
            raise InputError(
                f'the adapter holds "{name}" of shape {"×".join(map(str, trained.shape))}, which does not fit the '
                "model: it was trained on another"
            )
        if id(weight) in seen:  # Embeddings and head that are one weight are named twice.
            continue
        seen.add(id(weight))
        before = weight.data
        weight.data = _rounded_whole(before, trained, dtype, lost)
    return lost


def _rounded_whole(before: Tensor, trained: Tensor, dtype: torch.dtype, lost: LostPart) -> Tensor:
    """A weight that was trained whole, in its storage type."""
    after = trained.detach().cpu().to(dtype)
    _check_finite(after)
    step = max(1, _CHUNK // max(1, trained[0].numel()))
    for start in range(0, len(trained), step):
        part = slice(start, start + step)
        old = before[part].detach().cpu().double()
        lost.add(old, trained[part].detach().cpu().double() - old, after[part])
    return after


def stored_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of a model by name, each once (tied ones under their first name), without adapters."""
    found: dict[str, Tensor] = {name: weight for name, weight in model.named_parameters() if ".lora_" not in name}
    persistent = model.state_dict(keep_vars=True)
    found |= {name: buffer for name, buffer in model.named_buffers() if name in persistent and ".lora_" not in name}
    return {name.replace(".base_layer.", "."): weight for name, weight in found.items()}


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over name, type, shape and raw bytes of every weight, sorted by name."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        _add_weight(digest, name, weight)
    return digest.hexdigest()


@torch.no_grad()
def merged_weights(
    model: torch.nn.Module, adapter: Adapter, dtype: torch.dtype, lost: LostPart | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The weights that `merge_into` would leave, by name in order, on the CPU and a few at a time; no weight changes.

    Args:
        model: with the adapter attached.
        adapter: what is attached (`adapters.adapter_of`).
        dtype: storage type.
        lost: takes the part of the deltas that rounding took away, if given.
    """
    starts, counted = starts_of(model), LostPart() if lost is None else lost
    weights = sorted(stored_weights(model).items())

    def job(name: str, weight: Tensor) -> Callable[[], tuple[Tensor, LostPart]]:
        delta = adapter.deltas.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        cpu, before = weight.detach().cpu(), starts.get(name)
        if delta is not None:
            return _merging(cpu, [delta], dtype)
        part = LostPart()
        if before is not None:
            return lambda: (_rounded_whole(before, cpu, dtype, part), part)
        return lambda: (cpu.to(dtype), part)

    for (name, _), (merged, part) in zip(weights, _at_once(job(*item) for item in weights), strict=True):
        counted.include(part)
        yield name, merged


def merged_digest(model: torch.nn.Module, adapter: Adapter, dtype: torch.dtype) -> tuple[str, LostPart]:
    """What `weights_digest` would say after `merge_into`, without changing the model; a few weights at a time."""
    digest, lost = hashlib.sha256(), LostPart()
    for name, merged in merged_weights(model, adapter, dtype, lost):
        _add_weight(digest, name, merged)
    return digest.hexdigest(), lost


def _merging(weight: Tensor, deltas: Iterable[Delta], dtype: torch.dtype) -> Callable[[], tuple[Tensor, LostPart]]:
    """A job that merges into one weight; what it loses is counted by itself, so that threads do not matter."""

    def work() -> tuple[Tensor, LostPart]:
        part, merged = LostPart(), weight
        for delta in deltas:
            merged = merge_delta(merged, delta, dtype, part)
        return merged, part

    return work


def _at_once(jobs: Iterable[Callable[[], tuple[Tensor, LostPart]]]) -> Iterator[tuple[Tensor, LostPart]]:
    """Results in order, with as many jobs under way as torch has threads, and no more results waiting than that."""
    threads = min(torch.get_num_threads(), _AT_ONCE)
    waiting: deque[Future[tuple[Tensor, LostPart]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="merging") as pool:
        try:
            for job in jobs:
                if len(waiting) > threads:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(job))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def starts_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """What modules that are trained whole started from (`adapters.attach_lora` keeps it), by name of the weight."""
    parts = ((name.rpartition("."), buffer) for name, buffer in model.named_buffers())
    return {
        f"{owner}.{last.removeprefix(START_PREFIX)}": buffer
        for (owner, _, last), buffer in parts
        if last.startswith(START_PREFIX)
    }


def _add_weight(digest: hashlib._Hash, name: str, weight: Tensor) -> None:
    kind = str(weight.dtype).removeprefix("torch.")
    digest.update(f"{name}\0{kind}\0{','.join(map(str, weight.shape))}\0".encode())
    digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
