"""Merging adapters into weights: pure functions on tensors.

One delta at a time, in order of training: W' = round(W₆₄ + s·Σₖ bₖ⊗aₖ), in float64 and with one rounding to the type
in which the weights are stored. The sum over the rank is taken term by term with separate multiplications and
additions, never by a matrix product of a BLAS: those sum in an order that depends on processor and thread count, and
one weight in a hundred million would then round differently from one machine to the next.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from plumbline_api.errors import InputError
from torch import Tensor

_CHUNK = 1 << 17
"""Elements per block: large enough to hide the cost of a call, small enough to stay in the cache."""
LOST_PART_WARNING = 0.3
"""Share of a delta that may be lost by rounding before people are warned."""


@dataclass(frozen=True)
class Delta:
    """A low-rank change of one weight: scale · B·A."""

    a: Tensor
    """(rank, in), float32."""
    b: Tensor
    """(out, rank), float32."""
    scale: float
    """alpha/rank."""
    transposed: bool = False
    """Whether the weight is stored as (in, out), as GPT-2's Conv1D does."""


@dataclass
class LostPart:
    """How much of the deltas rounding took away, over all weights that they change."""

    lost_squared: float = 0.0
    delta_squared: float = 0.0
    unchanged: int = 0
    weights: int = 0

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
    b, a = (delta.a.T, delta.b.T) if delta.transposed else (delta.b, delta.a)
    rows, columns = b.shape[0], a.shape[1]
    if weight.shape != (rows, columns):
        raise InputError(
            f"an adapter of shape {rows}×{columns} does not fit weights of shape "
            f"{'×'.join(map(str, weight.shape))}: it was trained on another model"
        )
    b64, a64 = b.detach().double().contiguous(), a.detach().double().contiguous()
    merged = torch.empty(weight.shape, dtype=dtype)
    step = max(1, _CHUNK // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        before = weight[part].detach().double()
        change = torch.zeros_like(before)
        term = torch.empty_like(before)
        for k in range(a64.shape[0]):
            torch.mul(b64[part, k, None], a64[k], out=term)
            change.add_(term)
        change.mul_(delta.scale)
        after = round_to(before + change, dtype)
        if not bool(torch.isfinite(after).all()):
            raise InputError("merging gives weights that are not finite: training diverged. Lower the learning rate")
        merged[part] = after
        if lost is not None:
            kept = after.double() - before
            lost.lost_squared += float((change - kept).square().sum())
            lost.delta_squared += float(change.square().sum())
            lost.unchanged += int((kept == 0).sum())
            lost.weights += before.numel()
    return merged


@torch.no_grad()
def merge_into(model: torch.nn.Module, adapter: Adapter, dtype: torch.dtype) -> LostPart:
    """Add an adapter to a model in place, one weight at a time. The model is on the CPU in its storage type.

    Raises:
        InputError: if the adapter names modules that the model does not have.
    """
    modules = dict(model.named_modules())
    lost = LostPart()
    for name, delta in sorted(adapter.deltas.items()):
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise InputError(f'the adapter changes "{name}", which the model does not have: it was trained on another')
        weight.data = merge_delta(weight.data, delta, dtype, lost)
    return lost


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
def merged_digest(model: torch.nn.Module, adapter: Adapter, dtype: torch.dtype) -> tuple[str, LostPart]:
    """What `weights_digest` would say after `merge_into`, without changing the model. One merged weight at a time."""
    digest, lost = hashlib.sha256(), LostPart()
    for name, weight in sorted(stored_weights(model).items()):
        delta = adapter.deltas.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        cpu = weight.detach().cpu()
        _add_weight(digest, name, cpu.to(dtype) if delta is None else merge_delta(cpu, delta, dtype, lost))
    return digest.hexdigest(), lost


def _add_weight(digest: hashlib._Hash, name: str, weight: Tensor) -> None:
    kind = str(weight.dtype).removeprefix("torch.")
    digest.update(f"{name}\0{kind}\0{','.join(map(str, weight.shape))}\0".encode())
    digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
