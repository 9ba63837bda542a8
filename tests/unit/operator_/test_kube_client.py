"""The client of the API server over real HTTP: requests as they are sent, answers as they are understood."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import kopf
import pytest
from aiohttp import web
from plumbline_operator.connection import Connection, LoginError, login
from plumbline_operator.errors import (
    AlreadyExistsError,
    ApiError,
    ConflictError,
    ExpiredError,
    NotFoundError,
    RefusedError,
)
from plumbline_operator.kube import JOBS, PIPELINES, RUNTIMES, HttpKube
from plumbline_operator.main import kopf_settings


class Server:
    """Answers as a test says, and keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        self.answer: Callable[[web.Request], web.Response] = lambda request: web.json_response({})
        self.seen: list[tuple[str, str, int]] = []
        self.port = 0

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.method, request.path_qs, dict(request.headers), body))
        return self.answer(request)

    def kube(self, token_file: Path | None = None) -> HttpKube:
        info = kopf.ConnectionInfo(server=f"http://127.0.0.1:{self.port}", token="fixed")
        note = lambda verb, resource, status: self.seen.append((verb, resource, status))  # noqa: E731
        return HttpKube(Connection(info, token_file), timeout_seconds=1, agent="plumbline-operator/1", observer=note)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    found = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", found.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.port = runner.addresses[0][1]
    yield found
    await runner.cleanup()


def refusal(
    status: int, reason: str = "", message: str = "no", **headers: str
) -> Callable[[web.Request], web.Response]:
    body = {"kind": "Status", "code": status, "reason": reason, "message": message}
    return lambda request: web.json_response(body, status=status, headers=headers)


async def test_requests_as_the_api_server_wants_them(server: Server) -> None:
    kube = server.kube()
    await kube.get(RUNTIMES, "gpu")
    await kube.create(JOBS, {"kind": "Job"}, "team-a")
    await kube.patch(PIPELINES, "run", "team-a", {"status": {}}, "status")
    await kube.delete(JOBS, "j", "team-a", uid="u", resource_version="7", propagation="Foreground")
    await kube.close()
    assert [(method, path) for method, path, _, _ in server.asked] == [
        ("GET", "/apis/plumbline.dev/v1alpha1/alignmentruntimes/gpu"),
        ("POST", "/apis/batch/v1/namespaces/team-a/jobs"),
        ("PATCH", "/apis/plumbline.dev/v1alpha1/namespaces/team-a/alignmentpipelines/run/status"),
        ("DELETE", "/apis/batch/v1/namespaces/team-a/jobs/j"),
    ]
    assert server.asked[2][2]["Content-Type"] == "application/merge-patch+json"
    assert server.asked[0][2]["Authorization"] == "Bearer fixed"
    assert server.asked[0][2]["User-Agent"] == "plumbline-operator/1"
    assert server.asked[3][3]["preconditions"] == {"uid": "u", "resourceVersion": "7"}
    assert server.asked[3][3]["propagationPolicy"] == "Foreground"
    assert server.seen[0] == ("get", "alignmentruntimes", 200)


async def test_a_list_is_read_to_its_end(server: Server) -> None:
    def page(request: web.Request) -> web.Response:
        if "continue" in request.query:
            return web.json_response({"items": [{"n": 2}], "metadata": {"resourceVersion": "9"}})
        return web.json_response({"items": [{"n": 1}], "metadata": {"resourceVersion": "9", "continue": "more"}})

    server.answer = page
    kube = server.kube()
    pages = [found async for found in kube.pages(JOBS, labels="a=b")]
    await kube.close()
    assert [item["n"] for found in pages for item in found.items] == [1, 2]
    assert {found.resource_version for found in pages} == {9}
    assert "labelSelector=a%3Db" in server.asked[0][1] or "labelSelector=a=b" in server.asked[0][1]


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        (404, "NotFound", NotFoundError),
        (409, "AlreadyExists", AlreadyExistsError),
        (409, "Conflict", ConflictError),
        (410, "Expired", ExpiredError),
        (403, "Forbidden", RefusedError),
        (422, "Invalid", RefusedError),
        (400, "BadRequest", RefusedError),
        (401, "Unauthorized", ApiError),
        (429, "TooManyRequests", ApiError),
        (500, "InternalError", ApiError),
        (503, "", ApiError),
    ],
)
async def test_refusals_have_names(server: Server, status: int, reason: str, kind: type[ApiError]) -> None:
    server.answer = refusal(status, reason, "the server's own words")
    kube = server.kube()
    with pytest.raises(kind, match="the server's own words") as caught:
        await kube.get(JOBS, "j", "team-a")
    await kube.close()
    assert type(caught.value) is kind
    assert (caught.value.status, caught.value.reason) == (status, reason)


async def test_the_wait_that_a_server_asks_for(server: Server) -> None:
    server.answer = refusal(429, "TooManyRequests", **{"Retry-After": "7"})
    kube = server.kube()
    with pytest.raises(ApiError) as caught:
        await kube.get(JOBS, "j", "team-a")
    assert caught.value.retry_after == 7
    server.answer = lambda request: web.json_response(
        {"reason": "ServerTimeout", "details": {"retryAfterSeconds": 2}}, status=504
    )
    with pytest.raises(ApiError) as caught:
        await kube.get(JOBS, "j", "team-a")
    await kube.close()
    assert caught.value.retry_after == 2


@pytest.mark.parametrize(
    "answer",
    [
        lambda request: web.Response(status=502, text="<html>Bad Gateway</html>"),
        lambda request: web.Response(text="not json"),
        lambda request: web.json_response(["a list"]),
        lambda request: web.Response(status=301, headers={"Location": "http://elsewhere.example/"}),
    ],
)
async def test_what_is_no_answer_of_an_api_server_is_an_error(server: Server, answer: Any) -> None:
    server.answer = answer
    kube = server.kube()
    with pytest.raises(ApiError):
        await kube.get(JOBS, "j", "team-a")
    await kube.close()
    assert len(server.asked) == 1, "a token is not carried elsewhere"


async def test_a_server_that_is_not_there_is_an_error_with_status_0() -> None:
    info = kopf.ConnectionInfo(server="http://127.0.0.1:9")
    kube = HttpKube(Connection(info), timeout_seconds=1, agent="a")
    with pytest.raises(ApiError, match="does not answer") as caught:
        await kube.get(JOBS, "j", "team-a")
    await kube.close()
    assert caught.value.status == 0


async def test_a_token_that_was_renewed_is_read_again_at_once_after_a_refusal(server: Server, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    kube = server.kube(token)
    await kube.get(JOBS, "j", "team-a")
    token.write_text("second\n")
    server.answer = refusal(401, "Unauthorized")
    with pytest.raises(ApiError):
        await kube.get(JOBS, "j", "team-a")
    server.answer = lambda request: web.json_response({})
    await kube.get(JOBS, "j", "team-a")
    await kube.close()
    used = [headers["Authorization"] for _, _, headers, _ in server.asked]
    assert used == ["Bearer first", "Bearer first", "Bearer second"]


def test_no_credentials_is_said_in_plain_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    with pytest.raises(LoginError, match="KUBECONFIG"):
        login(kopf_settings())


def test_a_kubeconfig_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": "https://k.example:6443/"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    path = tmp_path / "config"
    path.write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(path))
    connection = login(kopf_settings())
    assert connection.server == "https://k.example:6443"
    assert connection.headers() == {"Authorization": "Bearer t"}
