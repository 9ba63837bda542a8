"""Work that one rank does for all: what it finds, and that it failed, is told to the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from plumbline_trainer.errors import InputError, TransientError

if TYPE_CHECKING:
    from torch import Tensor

    from plumbline_trainer.engine.distributed import Ranks

_FAULTS = (InputError, TransientError)
_WORDS_MAX = 2000
"""Bytes of an error that are passed on."""


def on_main_rank(ranks: Ranks, count: int, compute: Callable[[], Sequence[float]]) -> Tensor:
    """Numbers that rank 0 computes, on every rank: [count] float32 on the CPU.

    An error ends the call on every rank alike, in the same words, so that they can go on together, such as to write a
    checkpoint.

    Raises:
        InputError, TransientError: as `compute` did.
    """
    import torch

    found = torch.zeros(count, device=ranks.device)
    fault: InputError | TransientError | None = None
    if ranks.is_main:
        try:
            found.copy_(torch.tensor(compute(), dtype=torch.float32))
        except _FAULTS as error:
            fault = error
    if ranks.size > 1:
        fault = _shared(ranks, fault)
    if fault is not None:
        raise fault
    ranks.share([found])
    return found.cpu()


def _shared(ranks: Ranks, fault: InputError | TransientError | None) -> InputError | TransientError | None:
    """The error of rank 0 on every rank; None where there is none."""
    import torch

    words = "" if fault is None else f"{int(not isinstance(fault, InputError))}\n{fault.reason}\n{fault}"
    content = words.encode()[:_WORDS_MAX]
    buffer = torch.zeros(_WORDS_MAX, dtype=torch.uint8, device=ranks.device)
    buffer[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    ranks.share([buffer])
    if ranks.is_main or not buffer[0]:
        return fault
    kind, reason, message = bytes(buffer.tolist()).rstrip(b"\0").decode(errors="ignore").split("\n", 2)
    return _FAULTS[int(kind)](message, reason=reason)
