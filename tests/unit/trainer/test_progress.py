"""Progress: posted with the token, written to a file, never in the way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from plumbline_api.stagerun import ProgressReport
from plumbline_trainer.progress import ProgressReporter
from plumbline_trainer.storage.objects import ObjectStore


class Listener(ThreadingHTTPServer):
    """Takes reports."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.status = 200
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                listener.seen.append((self.headers.get("Authorization", ""), body))
                self.send_response(listener.status)
                if listener.status == 302:
                    self.send_header("Location", "http://127.0.0.1:9/")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/progress"


@pytest.fixture
def listener() -> Iterator[Listener]:
    server = Listener()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def reporter(tmp_path: Path, **environment: str) -> ProgressReporter:
    return ProgressReporter(
        store=ObjectStore(), run_root=f"file://{tmp_path}/run", scratch=tmp_path, environment=environment
    )


def test_reports_are_posted_with_the_token_of_now(tmp_path: Path, listener: Listener) -> None:
    token = tmp_path / "token"
    token.write_text("abc\n")
    progress = reporter(tmp_path, PLUMBLINE_PROGRESS_URL=listener.url, PLUMBLINE_PROGRESS_TOKEN_FILE=str(token))
    progress.update(25, 40, metrics={"loss": 0.123456789})
    token.write_text("renewed")
    progress.update(40, 40, "done", {"accuracy": 1})
    progress.close()
    authorization, body = listener.seen[-1]
    assert authorization == "Bearer renewed"
    status = ProgressReport.model_validate(body).trainer_status
    assert (status.progress_percentage, status.message) == (100, "done")
    assert status.metrics == [{"name": "loss", "value": "0.123457"}, {"name": "accuracy", "value": "1"}]


def test_posts_are_rare_and_the_last_one_is_sent(tmp_path: Path, listener: Listener) -> None:
    progress = reporter(tmp_path, PLUMBLINE_PROGRESS_URL=listener.url)
    for step in range(200):
        progress.update(step, 200)
    progress.close()
    # One at once, one with the first estimate, the last.
    assert len(listener.seen) <= 3
    assert listener.seen[-1][1]["trainerStatus"]["message"] == "step 199/200"


def test_the_first_steps_are_told_at_once(tmp_path: Path, listener: Listener) -> None:
    progress = reporter(tmp_path, PLUMBLINE_PROGRESS_URL=listener.url)

    def told(text: str) -> bool:
        deadline = time.monotonic() + 4  # Less than the pause between two reports.
        while time.monotonic() < deadline:
            if any(body["trainerStatus"]["message"] == text for _, body in listener.seen):
                return True
            time.sleep(0.01)
        return False

    progress.update(0, 300, "comparing the fast path with the plain one")
    assert told("comparing the fast path with the plain one")
    progress.update(1, 300)
    assert told("step 1/300")
    progress.update(2, 300)
    assert not any(body["trainerStatus"]["message"] == "step 2/300" for _, body in listener.seen)
    progress.close()
    assert listener.seen[-1][1]["trainerStatus"]["message"] == "step 2/300"


def test_the_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    progress = reporter(tmp_path, PLUMBLINE_PROGRESS_FILE=str(path))
    progress.update(1, 4)
    progress.close()
    assert ProgressReport.model_validate_json(path.read_bytes()).trainer_status.progress_percentage == 25
    assert sorted(p.name for p in tmp_path.iterdir()) == ["progress.json"]


def test_the_rest_is_estimated_from_the_last_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *(100.0 + 2.0 * i for i in range(60))])
    progress = reporter(tmp_path)
    monkeypatch.setattr(progress, "_deliver", lambda: None)
    monkeypatch.setattr("plumbline_trainer.progress.time.monotonic", lambda: next(clock))
    for step in range(60):
        progress.update(step, 100)
    assert progress._status is not None
    assert progress._status.estimated_remaining_seconds == pytest.approx(82.0)


@pytest.mark.parametrize("status", [302, 401, 500])
def test_a_listener_that_refuses_is_named_once_and_nothing_breaks(
    tmp_path: Path, listener: Listener, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    listener.status = status
    progress = reporter(tmp_path, PLUMBLINE_PROGRESS_URL=listener.url)
    with caplog.at_level("WARNING", logger="plumbline"):
        progress._log.propagate = True
        progress.update(1, 2)
        progress.close()
    assert [r.message for r in caplog.records if "does not reach the operator" in r.message]


def test_a_slow_listener_does_not_hold_a_step_up(tmp_path: Path) -> None:
    progress = reporter(
        tmp_path, PLUMBLINE_PROGRESS_URL="http://127.0.0.1:9/", PLUMBLINE_PROGRESS_TOKEN_FILE="/nonexistent"
    )
    start = time.perf_counter()
    for step in range(1000):
        progress.update(step, 1000, metrics={"loss": float("nan"), "x": 1.0})
    assert time.perf_counter() - start < 5
    progress.close()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1000
    assert json.loads(lines[0])["metrics"] == {"x": 1.0}


def test_nonsense_is_swallowed(tmp_path: Path) -> None:
    progress = reporter(tmp_path)
    progress.update(1, 0)
    progress.update(5, 2, "x" * 1000, {"y": float("inf")})
    progress.update(1, 2, metrics={"z": "words"})  # type: ignore[dict-item]
    progress.close()


def test_of_many_figures_the_telling_ones_travel(tmp_path, listener):
    progress = reporter(tmp_path, PLUMBLINE_PROGRESS_URL=listener.url)
    progress.update(1, 2, metrics={"reward": 1.0, "kl": 2.0, **{f"reward.component-{n}": 0.0 for n in range(16)}})
    progress.update(1, 2, metrics={"length.growth": 1.1, "goldReward": 0.5, "clipFraction": 0.1})
    progress.close()
    names = {item["name"] for item in listener.seen[-1][1]["trainerStatus"]["metrics"]}
    assert len(names) == 20
    assert {"reward", "kl", "length.growth", "goldReward", "clipFraction"} <= names
