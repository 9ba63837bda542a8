"""Work on more threads than the one that tests have; see tests/conftest.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def computing_on(threads: int) -> Iterator[None]:
    """So many threads of torch, until the block ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
