"""Sharding by FSDP2: every rank keeps a part of each weight, and a layer is put together while it computes.

A sharded tensor is cut into rows, ⌈rows / ranks⌉ for each rank from the first; the last ranks may have none. Without an
adapter all weights, their gradients and moments are sharded. With one the frozen weights are, and what is trained stays
whole on every rank.

Nothing here does anything to tensors that are not sharded, so that callers need not ask.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor

from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.layers import layer_stack
from plumbline_trainer.errors import InputError

if TYPE_CHECKING:
    from plumbline_trainer.engine.scorer import Scorer


def shard(scorer: Scorer, ranks: Ranks, *, kept: Collection[nn.Parameter] = ()) -> None:
    """Share a model's weights out over the ranks, in place; one rank keeps them all.

    The model may lie on the CPU: layer by layer it moves to the ranks' device. From now on all ranks must run it
    equally often, and gradients of sharded weights are summed over ranks by every backward pass.

    Args:
        scorer: Around the model.
        ranks: They share the weights.
        kept: Weights around the layers that every rank keeps whole nevertheless.

    Raises:
        InputError: if the model has no list of layers, or layers that share weights.
    """
    if ranks.size == 1:
        scorer.to(ranks.device)
        return
    layers = _layers(scorer)
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    whole = _stays_whole(scorer) | set(kept)
    for parameter in whole:
        parameter.data = parameter.data.to(ranks.device)
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    # What is around the layers (embeddings, last norm, head) is put together for the length of a call.
    fully_shard(scorer, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            # Losses are sums divided by the size of the step, so that gradients are summed and not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # Experts that no token of a rank went to have no gradient there.
            module.set_reduce_scatter_unused_params(True, recurse=False)
    for name in scorer.entries:
        register_fsdp_forward_method(scorer, name)
    scorer.most = ranks.most


def _layers(scorer: Scorer) -> list[nn.Module]:
    stack = layer_stack(scorer.model)
    kind = type(scorer.model).__name__
    if stack is None:
        raise InputError(f"training.sharding: {kind} has no list of layers to share out; set it to none")
    layers = list(scorer.model.get_submodule(stack).children())
    owners = [{id(parameter) for parameter in layer.parameters()} for layer in layers]
    inside = set().union(*owners)
    outside = {
        id(parameter)
        for name, parameter in scorer.model.named_parameters(remove_duplicate=False)
        if not name.startswith(f"{stack}.")
    }
    if len(inside) < sum(len(own) for own in owners) or inside & outside:
        raise InputError(f"training.sharding: layers of {kind} share weights with each other; set it to none")
    return layers


def _stays_whole(scorer: Scorer) -> set[nn.Parameter]:
    """What every rank keeps: all that is trained beside frozen weights, new heads, and what has no rows."""
    adapted = any(".lora_" in name for name, _ in scorer.model.named_parameters())
    own = {id(parameter) for parameter in scorer.model.parameters()}
    return {
        parameter
        for parameter in scorer.parameters()
        if id(parameter) not in own or parameter.ndim == 0 or (adapted and parameter.requires_grad)
    }


class _Exchange(ReduceScatter):
    """FSDP2's exchange of gradients, which can square them before they are summed."""

    def __init__(self) -> None:
        self.squares = False

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        if self.squares:
            input_tensor.square_()
        return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


@contextmanager
def squared_before_summing(scorer: Scorer) -> Iterator[None]:
    """While this is open, a backward pass leaves Σ_ranks g² as the gradient of a sharded weight instead of Σ_ranks g.

    A model must run once before each backward pass: of several runs each one's gradient would be squared alone.
    """
    exchange = _Exchange()
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(exchange)
    exchange.squares = True
    try:
        yield
    finally:
        exchange.squares = False


def start_over(scorer: Scorer) -> None:
    """Make a sharded model usable again after a forward pass that failed."""
    if isinstance(scorer, FSDPModule):
        scorer.reset_iter_state()


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this rank has only a part of a tensor."""
    return isinstance(tensor, DTensor)


@torch.no_grad()
def own_part(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this rank keeps, in the same memory; all of one that is not sharded."""
    if not is_sharded(tensor):
        return tensor
    return tensor.to_local().detach()


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on its device. Every rank must ask."""
    if not is_sharded(tensor):
        return tensor
    return tensor.full_tensor()


def own_rows(tensor: Tensor) -> slice:
    """Which rows of a tensor `own_part` has."""
    if not is_sharded(tensor):
        return slice(None)
    mesh = tensor.device_mesh
    rows = math.ceil(len(tensor) / mesh.size())
    start = mesh.get_local_rank() * rows
    return slice(start, start + rows)


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Write a whole value into a tensor; of a sharded one each rank writes its rows."""
    own_part(target).copy_(value[own_rows(target)] if is_sharded(target) else value)


def sharded_like(part: Tensor, like: Tensor) -> Tensor:
    """A tensor of which this rank keeps a part, cut as another one is; the part itself where that one is not cut."""
    if not is_sharded(like):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def gathered(tensors: Mapping[str, Tensor], *, keeps: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, for a rank that keeps them; the others only help. One is put together at a time."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if keeps or is_sharded(tensor):
            together = whole(tensor)
            if keeps:
                found[name] = together.detach().cpu().contiguous()
    return found


def gather_model(model: nn.Module, *, keeps: bool) -> None:
    """Put a sharded model together on the CPU of the rank that keeps it, for writing. It can compute no more."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in known:
                together = whole(parameter)
                taken = keeps and together is not parameter
                known[id(parameter)] = nn.Parameter(together.cpu(), requires_grad=False) if taken else parameter
            module._parameters[name] = known[id(parameter)]


def total(figures: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Sum of figures that were each computed from this rank's part of a tensor; each comes with the tensor."""
    pairs = list(figures)
    sums = torch.stack([figure for figure, _ in pairs])
    parts = torch.tensor([is_sharded(tensor) for _, tensor in pairs], device=sums.device)
    if not parts.any():
        return float(sums.sum())
    over_ranks = sums[parts].sum()
    dist.all_reduce(over_ranks)
    return float(over_ranks + sums[~parts].sum())
