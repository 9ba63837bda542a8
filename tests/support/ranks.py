"""Several ranks of a stage as forks of the test process: no second import of torch, so that a test takes seconds.

The launcher starts real processes; its own tests and the resume tests do it that way.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plumbline_api.stagerun import StageResult, StageRun
from plumbline_trainer.engine.distributed import Ranks, joined_ranks
from plumbline_trainer.worker import execute
from support.trainer import stage_context


def run_ranks(folder: Path, run: StageRun, timeout: float = 600) -> StageResult:
    """Run a stage with `run.processes_per_node` ranks to its end; the result of rank 0, which must be a success."""
    ranks, results = _start(folder, run)
    try:
        found = {}
        for _ in ranks:
            number, message, code = results.get(timeout=timeout)
            result = StageResult.model_validate_json(message)
            assert code == 0, f"rank {number}: {result.message}"
            found[number] = result
    finally:
        for rank in ranks:
            rank.join(timeout=10)
            if rank.is_alive():
                rank.kill()
    return found[0]


def in_ranks(size: int, work: Callable[[Ranks], Any], timeout: float = 600) -> list[Any]:
    """What a piece of work gives on each of so many ranks that have joined."""
    port, context = _free_port(), multiprocessing.get_context("fork")
    results: multiprocessing.Queue[tuple[int, Any]] = context.Queue()

    def rank(number: int) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with joined_ranks(number, size, torch.device("cpu")) as ranks:
            results.put((number, work(ranks)))

    processes = [context.Process(target=rank, args=(number,)) for number in range(size)]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=timeout) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return [found[number] for number in range(size)]


def run_killed_ranks(folder: Path, run: StageRun, timeout: float = 600) -> None:
    """Start ranks that the test has made to kill themselves, and see every one of them killed."""
    ranks, _ = _start(folder, run)
    try:
        for rank in ranks:
            rank.join(timeout)
            assert rank.exitcode == -signal.SIGKILL, f"a rank ended with {rank.exitcode}"
    finally:
        for rank in ranks:
            rank.kill()


def _start(folder: Path, run: StageRun) -> tuple[list[Any], Any]:
    port, context = _free_port(), multiprocessing.get_context("fork")
    results: multiprocessing.Queue[tuple[int, str, int]] = context.Queue()
    size = run.processes_per_node
    ranks = [context.Process(target=_rank, args=(folder, run, rank, size, port, results)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    return ranks, results


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _rank(folder: Path, run: StageRun, rank: int, size: int, port: int, results: object) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    context = stage_context(folder, run)
    context.rank, context.local_rank, context.world_size = rank, rank, size
    result, code = execute(context)
    results.put((rank, result.model_dump_json(by_alias=True), code))  # type: ignore[attr-defined]
