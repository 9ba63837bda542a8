"""One rank and two give the same scores and keep the same running moments."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.online import Reward
from plumbline_api.runtime import RewardEndpoint
from plumbline_trainer.data.rows import Message
from plumbline_trainer.engine.distributed import Ranks, joined_ranks
from plumbline_trainer.engine.values import ValueScorer, fresh_heads
from plumbline_trainer.models.loading import load_base
from plumbline_trainer.models.reward import RewardConfig, RewardModel
from plumbline_trainer.rewards.combining import RewardSet
from plumbline_trainer.rewards.endpoints import EndpointReward
from plumbline_trainer.rewards.functions import FunctionReward
from plumbline_trainer.rewards.interface import Candidate
from plumbline_trainer.rewards.learned import StageReward
from plumbline_trainer.rewards.metrics import MetricReward
from plumbline_trainer.rewards.rules import RuleReward, make_rule
from support.tiny import save_model
from torch import Tensor

CALLS: list[int] = []


def letters(prompts: Any, answers: list[str], references: Any) -> list[float]:
    CALLS.append(len(answers))
    return [len(set(answer)) / 3 for answer in answers]


def candidates(start: int, count: int = 13) -> list[Candidate]:
    texts = [f"the wall number {n} {'leans ' * (n % 5)}" for n in range(start, start + count)]
    return [
        Candidate((Message("user", f"Wall {n // 3}?"),), text, n % 7, "the wall leans", f"row-{n}")
        for n, text in enumerate(texts)
    ]


def reward_set(folder: Path, url: str) -> RewardSet:
    rewards = [
        Reward.model_validate(fields)
        for fields in (
            {"stage": "reward", "normalize": True, "ensemble": "min"},
            {"metric": "rougeL", "weight": 2.0},
            {"rule": "length", "weight": -0.1, "normalize": True, "clip": 1.0},
            {"function": "team:letters"},
            {"endpoint": "judge", "weight": 0.5},
        )
    ]
    model, tokenizer = load_base(folder, "float32")
    model.requires_grad_(False)
    scorer = ValueScorer(model, fresh_heads(model, 2, 5)).eval()
    config = RewardConfig(heads=2, max_length=256, mean=[0.1, -0.2], std=[1.0, 1.0])
    endpoint = RewardEndpoint.model_validate({"name": "judge", "url": url, "batchSize": 4})
    return RewardSet(
        rewards,
        [
            StageReward(RewardModel(scorer, tokenizer, config, tokens_per_batch=64), rewards[0]),
            MetricReward(rewards[1], "rewards[1]"),
            RuleReward(make_rule(rewards[2], "rewards[2]")),
            FunctionReward("team:letters", letters),
            EndpointReward(endpoint, environment={}),
        ],
    )


def scored(folder: Path, url: str, ranks: Ranks) -> tuple[list[Tensor], dict[str, Any], int]:
    found = reward_set(folder, url)
    totals = []
    for start in (0, 40):
        result = found.score(candidates(start), ranks=ranks)
        totals += [result.total, *result.components.values()]
    return totals, found.state(), len(CALLS)


def _rank(folder: Path, url: str, rank: int, port: int, results: Any) -> None:
    CALLS.clear()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with joined_ranks(rank, 2, torch.device("cpu")) as ranks:
        totals, state, calls = scored(folder, url, ranks)
    results.put((rank, [total.tolist() for total in totals], state, calls))


@pytest.fixture
def url() -> Any:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = json.dumps({"scores": [answer.count("leans") / 7 for answer in body["answers"]]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


def test_one_rank_and_two_agree(tmp_path: Path, url: str) -> None:
    folder = save_model(tmp_path / "model")
    CALLS.clear()
    alone, state, calls = scored(folder, url, Ranks())
    assert calls == 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(folder, url, rank, port, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        found = {number: rest for number, *rest in (results.get(timeout=120) for _ in ranks)}
    finally:
        for rank in ranks:
            rank.join(timeout=10)
            if rank.is_alive():
                rank.kill()
    for totals, moments, _ in found.values():
        assert totals == [total.tolist() for total in alone]
        assert moments == state
    assert [found[rank][2] for rank in (0, 1)] == [2, 0]  # A function is called once, on rank 0.
