"""The process's heap between the phases of a stage."""

from __future__ import annotations

import ctypes


def release_freed() -> None:
    """Give freed memory back to the system.

    glibc keeps what was freed below a block that is still in use: after the path check or a rollout that can be as much
    as a training step needs, in other sizes. Call it between phases: what comes back has to be mapped anew.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)
