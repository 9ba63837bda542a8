"""A stage whose reward endpoint fails: it stops with the endpoint's name, loses nothing, and ends with the same bits."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.runtime import RewardEndpoint
from plumbline_api.stagerun import StageRun
from plumbline_trainer.rewards import endpoints
from plumbline_trainer.worker import execute
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.trainer import output_folder, run_in_process, stage_context
from support.training_data import training_run

STEPS = 4
REWARDS = [
    {"rule": "keywords", "keywords": ["a", "e", "th"], "normalize": True},
    {"endpoint": "judge", "normalize": True, "clip": 2.0},
]


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "BACKOFF_SECONDS", 0.001)


class Judge:
    """Counts vowels; from a request on it misbehaves, as long as `fault` says how."""

    def __init__(self) -> None:
        self.asked, self.fault_from, self.fault = 0, 0, ""
        self.over, self.gave_up = threading.Event(), False
        self.when_hanging: Callable[[], None] = lambda: None
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.asked += 1
                scores: list[float] = [sum(letter in "aeiou" for letter in text) / 3 for text in body["answers"]]
                status = 200
                if judge.fault and judge.asked >= judge.fault_from:
                    if judge.fault == "hangs":
                        judge.when_hanging()
                        judge.gave_up |= not judge.over.wait(20)
                        return
                    status = 503 if judge.fault == "errors" else 200
                    scores = scores[:-1]
                content = json.dumps({"scores": scores}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/"


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    found = Judge()
    yield found
    found.over.set()
    found.server.shutdown()
    found.server.server_close()


def online_run(folder: Path, judge: Judge, timeout: str = "300ms", **fields: Any) -> StageRun:
    stage = {"rewards": REWARDS, "rollout": {"maxNewTokens": 6}, "answers": 3}
    settings: dict[str, Any] = {"rows": 16, "lora": {"rank": 4}, "globalBatch": 4, "maxLength": 64, "maxSteps": STEPS}
    run = training_run(folder, "grpo", stage=stage, learningRate=5e-3, **settings, **fields)
    endpoint = RewardEndpoint.model_validate({"name": "judge", "url": judge.url, "timeout": timeout})
    return run.model_copy(update={"endpoints": [endpoint]})


def weights_of(run: StageRun) -> dict[str, torch.Tensor]:
    return load_file(output_folder(run) / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("hangs", 75, "did not answer within 300ms"),
        ("errors", 75, "answered 503"),
        ("miscounts", 2, "sent 11 scores for 12 answers"),
    ],
)
def test_it_stops_with_the_name_and_loses_nothing(
    tmp_path: Path, judge: Judge, fault: str, code: int, words: str
) -> None:
    whole = online_run(tmp_path / "whole", judge)
    result, ended = run_in_process(tmp_path / "whole", whole)
    assert ended == 0, result.message
    judge.asked, judge.fault, judge.fault_from = 0, fault, 3
    broken = online_run(tmp_path / "broken", judge)
    result, ended = run_in_process(tmp_path / "broken", broken)
    assert ended == code
    assert 'the reward endpoint "judge"' in result.message
    assert words in result.message
    assert result.reason == ("BadInput" if code == 2 else "EndpointUnavailable")
    judge.fault = ""
    result, ended = run_in_process(tmp_path / "broken" / "again", broken)
    assert ended == 0, result.message
    # Two iterations were done; only what somebody has to mend first is not worth a checkpoint.
    assert result.first_step == (0 if code == 2 else 2)
    first, second = weights_of(whole), weights_of(broken)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sigterm_does_not_wait_for_an_endpoint_that_hangs(tmp_path: Path, judge: Judge) -> None:
    run = online_run(tmp_path, judge, timeout="2m")
    judge.fault, judge.fault_from = "hangs", 3
    context = stage_context(tmp_path, run)
    judge.when_hanging = context.stop.request
    result, ended = execute(context)
    assert not judge.gave_up, "the stage waited for the endpoint"
    assert ended == 143, result.message
    assert result.last_step == 2
    judge.fault = ""
    result, ended = run_in_process(tmp_path / "again", run)
    assert (ended, result.first_step, result.last_step) == (0, 2, STEPS), result.message


def test_two_ranks_stop_together(tmp_path: Path, judge: Judge) -> None:
    run = online_run(tmp_path, judge, processes=2)
    judge.fault, judge.fault_from = "errors", 3
    with pytest.raises(AssertionError, match=r"rank [01]: the reward endpoint .judge. .* answered 503 4 times"):
        run_ranks(tmp_path, run)
    judge.fault = ""
    again = tmp_path / "again"
    result = run_ranks(again, run)
    assert result.first_step == 2
