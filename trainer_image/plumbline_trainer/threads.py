"""How many threads compute, and how long one waits before it sleeps. No torch: it is set before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from plumbline_api.stagerun import STAGES_AT_ONCE_ENV

from plumbline_trainer.cgroups import available_cpus

SPINS = 10_000
"""Looks at a lock before a thread of libgomp sleeps.

Sleeping at once costs a quarter of the speed of a stage that is alone, since its threads are woken for every operation.
libgomp's own 300,000 looks gain little more, and where something else wants the processor they take the time that the
slower thread needs. `make bench` measures all three.
"""


def thread_settings(environment: Mapping[str, str], processes: int) -> dict[str, str]:
    """Variables of one of some processes that share this machine or pod. What is set already stands.

    Args:
        environment: Of the launcher.
        processes: Of the stage, on this node.
    """
    sharing = processes * max(int(environment.get(STAGES_AT_ONCE_ENV) or 1), 1)
    found = {"OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS") or str(max(1, available_cpus() // sharing))}
    if not environment.get("OMP_WAIT_POLICY") and not environment.get("GOMP_SPINCOUNT"):
        found["GOMP_SPINCOUNT"] = str(SPINS)
    return found
