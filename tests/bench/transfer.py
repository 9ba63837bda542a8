"""Checkpoint upload and download against a raw copy to the same S3 server, as ratios in one run.

The raw copy is boto3's own `upload_file` and `download_file` with its default settings, one file after the other: no
checksums of ours, no manifest. Plumbline's figure holds everything a checkpoint costs: hashing, upload, the manifest,
and on the way back the verification of every byte.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cluster.objectstore import ObjectStore, start_object_store
from cluster.state import ClusterState
from plumbline_api.pipeline import Storage
from plumbline_trainer.storage.objects import open_store
from support.trainer import stage_context

MEBIBYTE = 1024 * 1024
SIZES = {"lora (40 MiB)": [40], "135M float32 with optimizer (1.5 GiB)": [512, 512, 512]}
ROUNDS = 3


def measure() -> list[dict[str, str]]:
    """One row per size: megabytes per second of both, and the ratio of ours to raw (median of alternating rounds)."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        state = ClusterState(Path(folder) / "state", kind="object-store")
        try:
            server = start_object_store(state)
            os.environ.update(server.environment())
            for label, sizes in SIZES.items():
                rows.append(_measure(label, sizes, server, Path(folder)))
        finally:
            state.stop()
    return rows


def _measure(label: str, sizes: list[int], server: ObjectStore, scratch: Path) -> dict[str, str]:
    from plumbline_trainer.storage.checkpoints import load_latest_checkpoint, save_checkpoint, wait_for_uploads

    source = scratch / "source"
    source.mkdir(exist_ok=True)
    for index, size in enumerate(sizes):
        with (source / f"part-{index}.safetensors").open("wb") as file:
            for _ in range(size):
                file.write(os.urandom(MEBIBYTE))
    total = sum(sizes) * MEBIBYTE
    client, raw_up, raw_down, our_up, our_down = server.client(), [], [], [], []
    base = stage_context(scratch / "work")
    storage = Storage(uri=f"s3://{server.bucket}/bench", endpoint=server.endpoint, region=server.region)
    for attempt in range(ROUNDS):
        run = base.run.model_copy(update={"storage": storage, "fingerprint": f"{attempt:064x}"})
        # A node downloads a checkpoint once: every round has a scratch folder of its own, and an upload deletes its folder.
        own = scratch / f"round-{attempt}"
        shutil.copytree(source, own / "saving", copy_function=os.link)
        context = replace(base, run=run, store=open_store(storage), uploads=None, scratch=own)
        names = [path.name for path in sorted(source.iterdir())]

        def upload(names: list[str] = names) -> None:
            for name in names:
                client.upload_file(str(source / name), server.bucket, f"raw/{name}")

        def download(names: list[str] = names) -> None:
            for name in names:
                client.download_file(server.bucket, f"raw/{name}", str(scratch / "raw"))

        def save(context=context, attempt: int = attempt, folder: Path = own / "saving") -> None:
            save_checkpoint(context, attempt + 1, folder, {"step": attempt + 1})
            wait_for_uploads(context)

        raw_up.append(_seconds(upload))
        our_up.append(_seconds(save))
        raw_down.append(_seconds(download))
        our_down.append(_seconds(lambda context=context: load_latest_checkpoint(context)))
        shutil.rmtree(own)
    for path in source.iterdir():
        path.unlink()
    up = statistics.median(a / b for a, b in zip(raw_up, our_up, strict=True))
    down = statistics.median(a / b for a, b in zip(raw_down, our_down, strict=True))
    rate = f"{total / MEBIBYTE / statistics.median(our_up):.0f} / {total / MEBIBYTE / statistics.median(our_down):.0f}"
    return {"checkpoint": label, "up, down (MiB/s)": rate, "up ÷ raw": f"{up:.2f}", "down ÷ raw": f"{down:.2f}"}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
