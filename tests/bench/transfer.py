"""Checkpoint upload and download against a raw copy to the same S3 server, as ratios in one run.

The raw copy is boto3's own `upload_file` and `download_file` with its default settings, one file after the other: no
checksums of ours, no manifest. Plumbline's figure holds everything a checkpoint costs: hashing, upload, the manifest,
looking for older checkpoints to delete, and on the way back the verification of every byte. Both have a client that has
spoken to the server before, as a stage has long before its first checkpoint. Raw goes first in one round, ours in the
next.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.objectstore import ObjectStore, start_object_store
from cluster.state import ClusterState
from plumbline_api.pipeline import Storage
from plumbline_trainer.context import StageContext
from plumbline_trainer.storage.checkpoints import load_latest_checkpoint, save_checkpoint, wait_for_uploads
from plumbline_trainer.storage.files import file_digest
from plumbline_trainer.storage.objects import open_store
from support.trainer import stage_context

MEBIBYTE = 1024 * 1024
SIZES = {
    "lora (40 MiB)": ([40], 9),
    "135M float32 with optimizer (1.5 GiB)": ([512, 512, 512], 3),
}
"""Label → mebibytes of each file, and rounds: small ones are cheap to repeat, and need it."""


def measure() -> list[dict[str, str]]:
    """One row per size: megabytes per second of both, and the ratio of ours to raw (median of alternating rounds)."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        state = ClusterState(Path(folder) / "state", kind="object-store")
        try:
            server = start_object_store(state)
            os.environ.update(server.environment())
            for label, (sizes, rounds) in SIZES.items():
                rows.append(measure_size(label, sizes, rounds, server, Path(folder)))
        finally:
            state.stop()
    return rows


def measure_size(label: str, sizes: list[int], rounds: int, server: ObjectStore, scratch: Path) -> dict[str, str]:
    """The row of one size. Every round is work of its own: fingerprint, storage prefix and scratch folder."""
    source = scratch / "source"
    source.mkdir()
    for index, size in enumerate(sizes):
        with (source / f"part-{index}.safetensors").open("wb") as file:
            for _ in range(size):
                file.write(os.urandom(MEBIBYTE))
    names = [path.name for path in sorted(source.iterdir())]
    client = server.client()
    times: dict[str, list[float]] = {"raw up": [], "our up": [], "raw down": [], "our down": []}
    for number in range(rounds):
        own = scratch / f"round-{number}"
        context = _context(label, number, server, own)
        # The upload deletes its folder; the download is compared with the source.
        shutil.copytree(source, own / "saving", copy_function=os.link)
        (own / "raw").mkdir()
        calls: list[tuple[str, Callable[[], object]]] = [
            ("raw up", lambda: [client.upload_file(source / name, server.bucket, f"raw/{name}") for name in names]),
            ("our up", lambda context=context, own=own: _save(context, own / "saving")),
            (
                "raw down",
                lambda own=own: [
                    client.download_file(server.bucket, f"raw/{name}", str(own / "raw" / name)) for name in names
                ],
            ),
            ("our down", lambda context=context: load_latest_checkpoint(context)),
        ]
        if number % 2:
            calls = [calls[1], calls[0], calls[3], calls[2]]
        for name, call in calls:
            times[name].append(_seconds(call))
        for folder in (own / "raw", own / "checkpoint"):
            require_equal(source, folder)
        shutil.rmtree(own)
        context.store.delete_prefix(context.run.storage.uri)
    shutil.rmtree(source)
    return row_of(label, sum(sizes), times)


def row_of(label: str, mebibytes: int, times: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Rates of ours, and medians of the ratios within each round."""
    up = statistics.median(a / b for a, b in zip(times["raw up"], times["our up"], strict=True))
    down = statistics.median(a / b for a, b in zip(times["raw down"], times["our down"], strict=True))
    rates = [f"{mebibytes / statistics.median(times[name]):.0f}" for name in ("our up", "our down")]
    return {
        "checkpoint": label,
        "rounds": str(len(times["our up"])),
        "up, down (MiB/s)": " / ".join(rates),
        "up ÷ raw": f"{up:.2f}",
        "down ÷ raw": f"{down:.2f}",
        "aim": "≥ 0.8 both",
    }


def require_equal(source: Path, found: Path) -> None:
    """See that a download is complete: every file, every byte.

    Raises:
        RuntimeError: if it is not; a figure of a transfer that moved something else means nothing.
    """
    names = sorted(path.name for path in source.iterdir())
    have = sorted(path.name for path in found.iterdir()) if found.is_dir() else []
    different = [name for name in names if name in have and file_digest(source / name) != file_digest(found / name)]
    if have != names or different:
        raise RuntimeError(f"{found.name} holds {have} instead of {names}; different: {different or 'none'}")


def _context(label: str, number: int, server: ObjectStore, own: Path) -> StageContext:
    storage = Storage(
        uri=f"s3://{server.bucket}/bench-{secrets.token_hex(4)}", endpoint=server.endpoint, region=server.region
    )
    fingerprint = hashlib.sha256(f"{label}/{number}".encode()).hexdigest()
    base = stage_context(own / "work")
    run = base.run.model_copy(update={"storage": storage, "fingerprint": fingerprint})
    context = replace(base, run=run, store=open_store(storage), uploads=None, scratch=own)
    context.store.list(context.run_root)  # makes the client and its first connection
    return context


def _save(context: StageContext, folder: Path) -> None:
    save_checkpoint(context, 1, folder, {"step": 1})
    wait_for_uploads(context)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
