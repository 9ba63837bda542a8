"""How far a stage has come: told to whoever listens, kept as curves. Losing a report loses nothing."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plumbline_api.stagerun import (
    METRICS_MAX,
    PROGRESS_CA_ENV,
    PROGRESS_FILE_ENV,
    PROGRESS_TOKEN_ENV,
    PROGRESS_URL_ENV,
    ProgressReport,
    TrainerStatus,
)
from plumbline_api.watched import by_importance

from plumbline_trainer.storage import uris
from plumbline_trainer.storage.objects import ObjectStore

POST_EVERY_SECONDS = 5.0
FILE_EVERY_SECONDS = 0.5
UPLOAD_EVERY_SECONDS = 30.0
METRICS_FILE = "metrics.jsonl"
RATE_WINDOW = 50
"""Steps over which the rate is taken, so that a slow first step does not haunt the estimate."""


class ProgressReporter:
    """Takes figures from the stage and passes them on in a thread of its own. Never raises, never blocks a step."""

    def __init__(
        self,
        *,
        store: ObjectStore | None = None,
        run_root: str | None = None,
        scratch: Path | None = None,
        environment: Mapping[str, str] | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        env = os.environ if environment is None else environment
        self._url, self._token_file = env.get(PROGRESS_URL_ENV), env.get(PROGRESS_TOKEN_ENV)
        self._ca_file, self._file = env.get(PROGRESS_CA_ENV), env.get(PROGRESS_FILE_ENV)
        self._store, self._run_root = store, run_root
        self._metrics = None if scratch is None else scratch / METRICS_FILE
        self._log = log or logging.getLogger("plumbline")
        self._lock, self._wake, self._closed = threading.Lock(), threading.Event(), False
        self._status: TrainerStatus | None = None
        self._latest: dict[str, float] = {}
        self._times: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW)
        self._told: set[str] = set()
        self._unsent = self._unwritten = self._unsaved = False
        self._estimated = False
        self._sent = self._written = self._saved = -math.inf
        self._thread: threading.Thread | None = None

    def update(self, step: int, steps: int, message: str = "", metrics: Mapping[str, float] | None = None) -> None:
        """Say that `step` of `steps` are done. Metrics stay shown until they are given again."""
        try:
            self._update(step, steps, message, dict(metrics or {}))
        except Exception as error:
            self._tell_once(f"progress is not recorded: {error}")

    def rewind(self, step: int) -> None:
        """Take up the curves of earlier attempts, up to and including a step."""
        try:
            self._rewind(step)
        except Exception as error:
            self._tell_once(f"earlier figures are lost: {error}")

    def close(self) -> None:
        """Send the last report and upload the curves."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._wake.set()
        if thread is not None:
            thread.join(timeout=20)

    def _update(self, step: int, steps: int, message: str, metrics: dict[str, float]) -> None:
        now, when = time.monotonic(), datetime.now(UTC).isoformat(timespec="milliseconds")
        kept = {name: float(value) for name, value in metrics.items() if math.isfinite(float(value))}
        with self._lock:
            self._latest = {**{k: v for k, v in self._latest.items() if k not in kept}, **kept}
            if not self._times or self._times[-1][1] != step:
                self._times.append((now, step))
            shown = self._latest
            if len(shown) > METRICS_MAX:
                # Those that people look at first travel, then the newest.
                shown = dict(list(by_importance(dict(reversed(shown.items()))).items())[:METRICS_MAX])
            remaining = self._remaining(step, steps)
            if remaining is not None and not self._estimated:
                # The first sign that steps are being made does not wait for its turn.
                self._estimated, self._sent = True, -math.inf
            self._status = TrainerStatus(
                progress_percentage=None if steps <= 0 else max(0, min(100, int(100 * step / steps))),
                estimated_remaining_seconds=remaining,
                metrics=[{"name": name[:128], "value": f"{value:.6g}"} for name, value in shown.items()],
                message=(message or (f"step {step}/{steps}" if steps > 0 else ""))[:256],
                last_updated_time=when,
            )
            self._unsent = self._unwritten = True
            if kept and self._metrics is not None:
                line = {"step": step, "steps": steps, "time": when, "metrics": kept}
                with self._metrics.open("a", encoding="utf-8") as sink:
                    sink.write(json.dumps(line, separators=(",", ":")) + "\n")
                self._unsaved = True
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._deliver, name="progress", daemon=True)
                self._thread.start()
        self._wake.set()

    def _remaining(self, step: int, steps: int) -> float | None:
        """Seconds left at the rate of the last steps."""
        if steps <= 0 or len(self._times) < 2:
            return None
        (start, first), (end, last) = self._times[0], self._times[-1]
        if last <= first or end <= start:
            return None
        return round(max(0, steps - step) * (end - start) / (last - first), 1)

    def _rewind(self, step: int) -> None:
        if self._store is None or self._run_root is None or self._metrics is None:
            return
        try:
            data = self._store.get_bytes(uris.join(self._run_root, METRICS_FILE))
        except FileNotFoundError:
            return
        kept = [line for line in data.decode().splitlines() if _step_of(line) <= step]
        with self._lock:
            self._metrics.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def _deliver(self) -> None:
        while True:
            self._wake.wait(timeout=1.0)
            with self._lock:
                self._wake.clear()
                closed, status = self._closed, self._status
                now = time.monotonic()
                write = self._unwritten and (closed or now - self._written >= FILE_EVERY_SECONDS)
                send = self._unsent and (closed or now - self._sent >= POST_EVERY_SECONDS)
                save = self._unsaved and (closed or now - self._saved >= UPLOAD_EVERY_SECONDS)
                self._unwritten, self._written = (False, now) if write else (self._unwritten, self._written)
                self._unsent, self._sent = (False, now) if send else (self._unsent, self._sent)
                self._unsaved, self._saved = (False, now) if save else (self._unsaved, self._saved)
            if status is not None:
                body = json.dumps(ProgressReport(trainer_status=status).to_wire()).encode()
                if write and self._file:
                    self._attempt("the progress file is not written", self._write, Path(self._file), body)
                if send and self._url:
                    self._attempt("progress does not reach the operator", self._post, body)
            if save:
                self._attempt("the curves are not uploaded", self._upload)
            if closed:
                return
            if not (write or send or save):
                # Nothing was due: rest, so that fast steps do not make this thread spin.
                time.sleep(0.1)

    def _write(self, path: Path, body: bytes) -> None:
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        partial.write_bytes(body)
        partial.replace(path)

    def _post(self, body: bytes) -> None:
        assert self._url is not None
        headers = {"Content-Type": "application/json"}
        if self._token_file:
            # Read each time: the kubelet renews the token.
            headers["Authorization"] = f"Bearer {Path(self._token_file).read_text(encoding='utf-8').strip()}"
        handlers: list[Any] = [_NoRedirects()]
        if self._url.startswith("https:"):
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=self._ca_file)))
        request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")  # noqa: S310
        with urllib.request.build_opener(*handlers).open(request, timeout=5):
            pass

    def _upload(self) -> None:
        if self._store is not None and self._run_root is not None and self._metrics is not None:
            self._store.put_bytes(uris.join(self._run_root, METRICS_FILE), self._metrics.read_bytes())

    def _attempt(self, complaint: str, work: Any, *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self._tell_once(f"{complaint}: {error}")

    def _tell_once(self, complaint: str) -> None:
        if complaint not in self._told and len(self._told) < 20:
            self._told.add(complaint)
            self._log.warning("%s", complaint)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the bearer token somewhere else."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
