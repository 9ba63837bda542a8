"""What `plan` is told besides the snapshot."""

from __future__ import annotations

from dataclasses import dataclass

from plumbline_api.pipeline import Storage
from plumbline_api.runtime import RewardEndpoint


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """Numbers that steer decisions; tests and local runs shrink them."""

    operator_version: str
    """Goes into the run record."""
    backoff_base_seconds: float = 10.0
    """Wait after the first failed attempt; it doubles with every further one."""
    backoff_cap_seconds: float = 300.0
    """Longest wait between attempts."""
    progress_interval_seconds: float = 10.0
    """Least time between two writes of status that change nothing but progress."""
    twin_poll_seconds: float = 30.0
    """How often to look whether another pipeline has finished the same work."""
    runtime_poll_seconds: float = 60.0
    """How often to look for a runtime that is missing."""
    result_wait_seconds: float = 60.0
    """How long to wait for the result of an attempt that has ended before it counts as lost."""
    attempts_max: int = 100
    """Attempts of one stage, free ones included, before it fails."""
    recoveries_max: int = 2
    """Times that a stage's lost inputs are computed again."""
    implicit_retries: int = 3
    """Retries of preflight and finalize."""
    implicit_timeout_seconds: int = 1800
    """Longest time of finalize and of reading one result back from storage, waiting for a node included."""
    local_storage: Storage | None = None
    """Where results of a local run go."""
    local_endpoints: tuple[RewardEndpoint, ...] = ()
    """Reward endpoints that a local run knows of."""
