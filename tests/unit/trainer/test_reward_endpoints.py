"""Reward endpoints over real HTTP: what is sent, what is believed, and who has to act when something is wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from plumbline_api.runtime import RewardEndpoint
from plumbline_trainer.data.rows import Message
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.rewards.endpoints import EndpointReward
from plumbline_trainer.rewards.interface import Candidate
from support.reward_service import Answer, Service, lengths, saying, send, serving


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as found:
        yield found


def endpoint(service: Service, **fields: Any) -> RewardEndpoint:
    return RewardEndpoint.model_validate({"name": "help-ful", "url": service.url, "timeout": "500ms", **fields})


def opened(service: Service, environment: dict[str, str] | None = None, **fields: Any) -> EndpointReward:
    return EndpointReward(endpoint(service, **fields), environment=environment or {}, backoff_seconds=0.001)


def answers(*texts: str) -> list[Candidate]:
    prompt = (Message("system", "Be kind."), Message("user", "Why?"))
    return [Candidate(prompt, text, 3, "because" if n else None, f"row-{n}") for n, text in enumerate(texts)]


def score(reward: EndpointReward, *texts: str) -> list[float]:
    return reward.score(answers(*texts), Ranks()).tolist()


def test_it_is_sent_prompts_answers_and_references_in_batches(service: Service) -> None:
    assert score(opened(service, batchSize=2), "a", "bb", "ccc", "dddd", "eeeee") == [1, 2, 3, 4, 5]
    bodies = [body for _, body in service.requests]
    assert [body["answers"] for body in bodies] == [["a", "bb"], ["ccc", "dddd"], ["eeeee"]]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    assert bodies[0] == {"prompts": [messages] * 2, "answers": ["a", "bb"], "references": [None, "because"]}


def test_the_token_of_the_secret_is_sent_as_a_bearer_token(service: Service) -> None:
    environment = {"PLUMBLINE_ENDPOINT_TOKEN_HELP_FUL": "s3cret\n"}
    score(opened(service, environment, secretName="judge"), "a")
    assert service.requests[0][0]["Authorization"] == "Bearer s3cret"


def test_without_a_secret_nothing_is_sent_not_even_from_a_password_file(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login ada password lovelace\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    score(opened(service), "a")
    assert "Authorization" not in service.requests[0][0]


def test_a_missing_token_is_told_before_anything_is_asked(service: Service) -> None:
    with pytest.raises(InputError, match=r"PLUMBLINE_ENDPOINT_TOKEN_HELP_FUL is not set.*Secret judge"):
        opened(service, secretName="judge")
    assert not service.requests


def test_an_endpoint_that_hangs_is_named_and_may_be_tried_again(service: Service) -> None:
    over = threading.Event()
    service.answer = lambda _handler, _body: over.wait(20) and None
    started = time.monotonic()
    try:
        with pytest.raises(TransientError, match=r'"help-ful" \(http.*\) did not answer within 100ms, 4 times') as told:
            score(opened(service, timeout="100ms"), "a")
    finally:
        over.set()
    assert told.value.reason == "EndpointUnavailable"
    assert time.monotonic() - started < 5
    assert len(service.requests) == 4


def test_an_answer_that_trickles_in_is_not_waited_for(service: Service) -> None:
    over = threading.Event()

    def trickle(handler: BaseHTTPRequestHandler, _body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while not over.wait(0.02):
            try:
                handler.wfile.write(b" ")
            except OSError:
                return

    service.answer = trickle
    started = time.monotonic()
    try:
        with pytest.raises(TransientError, match="did not finish its answer within 200ms"):
            score(opened(service, timeout="200ms"), "a")
    finally:
        over.set()
    assert time.monotonic() - started < 5


def test_an_answer_that_breaks_off_may_be_tried_again(service: Service) -> None:
    def cut(handler: BaseHTTPRequestHandler, _body: dict[str, Any]) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"scores": [')
        handler.close_connection = True

    service.answer = cut
    with pytest.raises(TransientError, match='"help-ful"'):
        score(opened(service), "a")


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_fault_that_passes_is_tried_again(service: Service, status: int) -> None:
    def second(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if len(service.requests) < 3:
            send(handler, b"not now", status)
        else:
            lengths(handler, body)

    service.answer = second
    assert score(opened(service), "abc") == [3]
    assert len(service.requests) == 3


@pytest.mark.parametrize("status", [500, 503])
def test_a_fault_that_stays_ends_the_attempt(service: Service, status: int) -> None:
    service.answer = saying("no", status)
    with pytest.raises(TransientError, match=f'"help-ful" .* answered {status} 4 times'):
        score(opened(service), "a")
    assert len(service.requests) == 4


def test_a_service_that_is_not_there_may_come_back() -> None:
    gone = RewardEndpoint.model_validate({"name": "gone", "url": "http://127.0.0.1:9/score", "timeout": "1s"})
    with pytest.raises(TransientError, match=r'"gone" .* cannot be reached: .*refused, 4 times'):
        score(EndpointReward(gone, environment={}, backoff_seconds=0.001), "a")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (saying('{"scores": [1]}'), "sent 1 scores for 2 answers"),
        (saying('{"scores": [1, 2, 3]}'), "sent 3 scores for 2 answers"),
        (saying('{"scores": [1, NaN]}'), "sent nan for answer 1 of 2; a finite number is needed"),
        (saying('{"scores": [1, 1e999]}'), "sent inf for answer 1 of 2"),
        (saying('{"scores": [1, null]}'), "sent None for answer 1 of 2; a number is needed"),
        (saying('{"scores": [1, "2"]}'), "sent '2' for answer 1 of 2"),
        (saying('{"scores": [1, true]}'), "sent True for answer 1 of 2"),
        (saying('{"score": [1, 2]}'), "sent no list of scores"),
        (saying("[1, 2]"), "sent no list of scores"),
        (saying("<html>"), "sent no JSON: '<html>'"),
        (saying("who are you", 401), "answered 401: who are you. Its spec.rewardEndpoints names no secretName"),
        (saying("", 404), "answered 404. Ask the owners of the runtime"),
        (saying("too long", 422), "answered 422: too long"),
        (saying("", 302, Location="http://127.0.0.1:9/"), "answered 302. Redirects are not followed"),
    ],
)
def test_what_trying_again_does_not_mend_is_told_at_once(service: Service, answer: Answer, words: str) -> None:
    service.answer = answer
    with pytest.raises(InputError) as told:
        score(opened(service), "a", "b")
    assert str(told.value).startswith(f'the reward endpoint "help-ful" ({service.url}) ')
    assert words in str(told.value)
    assert len(service.requests) == 1


def test_a_flood_is_not_read(service: Service) -> None:
    service.answer = lambda handler, _body: send(handler, b" " * (17 * 2**20))
    with pytest.raises(InputError, match="more than 16 MiB"):
        score(opened(service, timeout="30s"), "a")
