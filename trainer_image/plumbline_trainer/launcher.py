"""Process 1 of a trainer pod: starts the ranks, passes signals on, and says in one message how the attempt ended.

It stays small and never imports torch: it must still be there to tell what happened when a rank runs out of memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from plumbline_api import layout
from plumbline_api.stagerun import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_TRANSIENT,
    METRICS_MAX,
    RESULT_FILE_NAME,
    STAGE_ENV,
    TERMINATION_LOG_ENV,
    StageResult,
    StageRun,
)
from plumbline_api.stages import STAGE_TYPES

from plumbline_trainer.cgroups import oom_kills
from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.outcomes import RankReport, Verdict, failure, judge, read_report
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.manifests import damage, finite, read_manifest
from plumbline_trainer.storage.objects import ObjectStore, open_store
from plumbline_trainer.threads import thread_settings
from plumbline_trainer.transcript import Transcript

GRACE_ENV = "PLUMBLINE_GRACE_SECONDS"
"""Seconds from SIGTERM until the pod is killed; the ranks get a little less, so that their end can be reported."""
GRACE_SECONDS = 120.0
MASTER_ENV = "PLUMBLINE_MASTER_ADDR"
"""Host name of node 0, where there are several nodes."""
MASTER_PORT = 29500
SCRATCH_ENV = "PLUMBLINE_SCRATCH"
"""Private folder that the launcher shares with its ranks."""
DEFAULT_TERMINATION_LOG = Path("/dev/termination-log")
PEER_SECONDS = 5.0
"""Time that ranks get to end by themselves once another one has failed: they wait for a peer that is gone."""


@dataclass
class Rank:
    """One process of the stage."""

    number: int
    local: int
    process: subprocess.Popen[bytes]
    started: float
    ended: float | None = None
    killed: bool = False
    """Whether it ended because the launcher ended it."""


def main() -> None:
    """Entry point of `plumbline-trainer`."""
    sys.exit(launch(os.environ))


def launch(environment: Mapping[str, str]) -> int:
    """Run one attempt; the exit code of the stage contract."""
    stop = StopRequest()
    stop.listen()
    try:
        run = StageRun.from_json(environment.get(STAGE_ENV, ""))
        check_versions(run)
    except InputError as error:
        _say(str(error))
        write_termination(environment, failure(error.reason, str(error)))
        return EXIT_BAD_INPUT
    store = open_store(run.storage)
    node = int(environment.get("JOB_COMPLETION_INDEX", "0") or 0) if run.nodes > 1 else 0
    transcript = Transcript()
    try:
        verdict = already_done(store, run) or run_ranks(run, environment, node, stop, transcript)
    except InputError as error:
        verdict = Verdict(failure(error.reason, str(error)), EXIT_BAD_INPUT)
    except TransientError as error:
        verdict = Verdict(failure(error.reason, str(error)), EXIT_TRANSIENT)
    if verdict.result.outcome != "Succeeded":
        _say(f"{verdict.result.reason}: {verdict.result.message}")
    record(store, run, node, verdict.result, transcript)
    write_termination(environment, verdict.result)
    return verdict.exit_code


def check_versions(run: StageRun) -> None:
    """Refuse work whose numbers this trainer would compute otherwise.

    Raises:
        InputError: reason RuntimeTooOld.
    """
    if run.role != "stage":
        return
    kind = STAGE_TYPES.get(run.type)
    known = None if kind is None else kind.numerics_version
    if known != run.numerics_version:
        has = "does not know it" if known is None else f"has version {known}"
        raise InputError(
            f"stage {run.stage} needs numerics version {run.numerics_version} of {run.type}; this trainer {has}. "
            "Use the trainer image that belongs to the operator's release",
            reason="RuntimeTooOld",
        )


def already_done(store: ObjectStore, run: StageRun) -> Verdict | None:
    """The result of work that is committed and whole: another attempt, or another pipeline, has done it."""
    if run.role != "stage":
        return None
    root = layout.stage_root(run.storage.uri, run.pipeline.namespace, run.type, run.fingerprint)
    try:
        found = read_manifest(store, root)
    except InputError as error:
        if error.reason != "InputMissing":
            raise
        _say(f"{error}; it is computed again")
        return None
    if found is None:
        return None
    manifest, digest = found
    if fault := damage(store, root, manifest):
        _say(f"the committed output is not used, it is computed again: {fault}")
        return None
    for parent in manifest.parents:
        if parent.fingerprint is None or parent.type is None:
            continue
        place = layout.stage_root(run.storage.uri, run.pipeline.namespace, parent.type, parent.fingerprint)
        current = read_manifest(store, place)
        if current is not None and current[1] != parent.manifest_digest:
            _say(f'the committed output is not used, its input "{parent.name}" was computed again since')
            return None
    result = StageResult(
        outcome="Succeeded",
        reason="Completed",
        message=manifest.aborted or "the output was committed before; nothing was computed",
        manifest_digest=digest,
        metrics=dict(list(finite(manifest.metrics).items())[:METRICS_MAX]),
        reused=True,
    )
    return Verdict(result, EXIT_DONE)


def run_ranks(
    run: StageRun, environment: Mapping[str, str], node: int, stop: StopRequest, transcript: Transcript
) -> Verdict:
    """Start the ranks of this node, see them through, and judge how they ended."""
    folder = Path(tempfile.mkdtemp(prefix="plumbline-", dir=environment.get("TMPDIR")))
    oom_before = oom_kills()
    try:
        ranks = _start(run, environment, node, folder, transcript)
        try:
            _supervise(ranks, stop, _grace(environment))
        finally:
            for rank in ranks:
                if rank.process.poll() is None:
                    rank.process.kill()
                    rank.process.wait()
        transcript.join()
        reports = [_report(rank, folder) for rank in ranks]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    oom_after = oom_kills()
    oom = None if oom_before is None or oom_after is None else oom_after > oom_before
    return judge(reports, nodes=run.nodes, out_of_memory=oom, last_output=transcript.last_lines())


def _start(
    run: StageRun, environment: Mapping[str, str], node: int, folder: Path, transcript: Transcript
) -> list[Rank]:
    count = run.processes_per_node
    world = run.nodes * count
    address, port = "127.0.0.1", 0
    if run.nodes > 1:
        address, port = environment.get(MASTER_ENV, ""), MASTER_PORT
        if not address:
            raise InputError(
                f"stage {run.stage} runs on {run.nodes} nodes, but {MASTER_ENV} is not set. "
                "Use the operator that belongs to this trainer's release",
                reason="RuntimeTooOld",
            )
    elif world > 1:
        port = _free_port()
    ranks: list[Rank] = []
    for local in range(count):
        number = node * count + local
        added = {
            "RANK": number,
            "LOCAL_RANK": local,
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
            SCRATCH_ENV: folder,
            **thread_settings(environment, count),
            "TOKENIZERS_PARALLELISM": environment.get("TOKENIZERS_PARALLELISM", "true"),
            "CUBLAS_WORKSPACE_CONFIG": environment.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
            "PYTHONUNBUFFERED": 1,
        }
        # A rank unblocks SIGTERM once it can answer it; until then the signal waits.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "plumbline_trainer.worker"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**environment, **{name: str(value) for name, value in added.items()}},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert process.stdout is not None
        transcript.follow(process.stdout, prefix=f"[rank {number}] " if world > 1 else "")
        ranks.append(Rank(number, local, process, time.monotonic()))
    return ranks


def _supervise(ranks: list[Rank], stop: StopRequest, grace: float) -> None:
    """Return when every rank has ended.

    SIGTERM is passed on and waited out. A rank that fails takes the others along, because they would wait for it; ranks
    that stopped on SIGTERM or are done do not.
    """
    forwarded, kill_at = False, None
    while any(rank.ended is None for rank in ranks):
        for rank in ranks:
            if rank.ended is None and rank.process.poll() is not None:
                rank.ended = time.monotonic()
        _reap(ranks)
        now = time.monotonic()
        if stop.requested and not forwarded:
            forwarded, kill_at = True, min(kill_at or float("inf"), now + grace)
            _signal(ranks, signal.SIGTERM)
        failed = any(r.ended is not None and not r.killed and r.process.returncode not in (0, 143) for r in ranks)
        if failed and (kill_at is None or kill_at > now + PEER_SECONDS):
            kill_at = now + PEER_SECONDS
            _signal(ranks, signal.SIGTERM)
        if kill_at is not None and now >= kill_at:
            for rank in ranks:
                rank.killed |= rank.ended is None
            _signal(ranks, signal.SIGKILL)
        stop.wait(0.05 if kill_at is None else 0.02)


def _signal(ranks: list[Rank], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                rank.process.send_signal(number)


def _reap(ranks: list[Rank]) -> None:
    """Take the orphans that process 1 of a container inherits; the ranks themselves are subprocess's to wait for."""
    if os.getpid() != 1:
        return
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if any(rank.process.pid == found.si_pid for rank in ranks):
                return
            os.waitpid(found.si_pid, os.WNOHANG)


def _report(rank: Rank, folder: Path) -> RankReport:
    assert rank.ended is not None
    return RankReport(
        rank=rank.number,
        exit_code=rank.process.returncode,
        killed=rank.killed,
        ended=rank.ended,
        seconds=rank.ended - rank.started,
        said=read_report(folder / f"rank-{rank.number}.json"),
    )


def record(store: ObjectStore, run: StageRun, node: int, result: StageResult, transcript: Transcript) -> None:
    """Keep the log, and on node 0 the result, in storage. What cannot be kept does not change how the attempt ended."""
    root = layout.stage_run_root(run.storage.uri, run.pipeline.namespace, run.type, run.fingerprint, run.pipeline.uid)
    suffix = f"-node-{node}" if run.nodes > 1 else ""
    if run.role == "collect":
        return  # it only reads what is recorded already
    files = {f"logs/attempt-{run.attempt}{suffix}.txt": transcript.content()}
    if node == 0:
        text = json.dumps(result.to_wire(), ensure_ascii=False, indent=1).encode()
        files |= {RESULT_FILE_NAME: text, f"results/attempt-{run.attempt}.json": text}
    for name, data in files.items():
        if not data:
            continue
        try:
            store.put_bytes(uris.join(root, name), data)
        except (InputError, TransientError, OSError) as error:
            _say(f"{name} was not kept: {error}")


def write_termination(environment: Mapping[str, str], result: StageResult) -> None:
    """Leave the result where the kubelet (or the local runner) reads it."""
    given = environment.get(TERMINATION_LOG_ENV)
    path = Path(given) if given else DEFAULT_TERMINATION_LOG
    if not given and not path.exists():
        print(result.to_message(), flush=True)  # noqa: T201 - run by hand: nobody but the terminal listens
        return
    try:
        path.write_text(result.to_message(), encoding="utf-8")
    except OSError as error:
        _say(f"the termination message was not written to {path}: {error}")


class StopRequest:
    """SIGTERM and SIGINT, noted and waited for."""

    def __init__(self) -> None:
        self.requested = False
        self._event = threading.Event()

    def listen(self) -> None:
        """Note the signals from now on; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)
            signal.signal(signal.SIGINT, self._note)

    def wait(self, seconds: float) -> None:
        """Rest; a signal ends it early."""
        if self._event.wait(seconds):
            self._event.clear()

    def _note(self, _number: int, _frame: object) -> None:
        self.requested = True
        self._event.set()


def _grace(environment: Mapping[str, str]) -> float:
    try:
        seconds = float(environment.get(GRACE_ENV, "") or GRACE_SECONDS)
    except ValueError:
        seconds = GRACE_SECONDS
    return max(1.0, seconds - min(10.0, 0.1 * seconds))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the log of a pod is its output


if __name__ == "__main__":
    main()
