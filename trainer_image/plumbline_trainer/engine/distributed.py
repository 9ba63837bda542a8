"""The ranks of a stage: joining, summing, agreeing. With one rank every operation is the identity."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Longer than any step: a rank that is gone is noticed by the launcher, not by this."""


class Ranks:
    """The processes that run a stage together."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device(device)

    @property
    def is_main(self) -> bool:
        """Whether this rank reports and writes."""
        return self.rank == 0

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks, in one exchange per data type."""
        if self.size == 1:
            return
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for group in by_type.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            dist.all_reduce(flat)
            for tensor, part in zip(group, torch.split(flat, [tensor.numel() for tensor in group]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def sum_floats(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over ranks of figures that every rank has under the same names, in float64."""
        if self.size == 1:
            return dict(values)
        names = sorted(values)
        total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes; every rank gets the same answer."""
        return self.sum_floats({"flag": float(flag)})["flag"] > 0

    def most(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.size == 1:
            return value
        found = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found.item())

    def same(self, value: int) -> bool:
        """Whether every rank has the value of rank 0."""
        if self.size == 1:
            return True
        first = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.broadcast(first, src=0)
        return not self.any(int(first.item()) != value)

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined_ranks(rank: int, size: int, device: torch.device) -> Iterator[Ranks]:
    """Join the processes that the launcher started; it sets MASTER_ADDR and MASTER_PORT.

    gloo carries CPU tensors, NCCL those of accelerators.
    """
    if size == 1:
        yield Ranks(device=device)
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise RuntimeError(f"{size} ranks cannot meet: the launcher did not set {name}")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield Ranks(rank, size, device)
    finally:
        dist.destroy_process_group()
