"""A reverse proxy between the operator and the API server that fails on purpose.

It answers errors instead of passing requests on, cuts connections, and calls back before and after every write, so
that a test can kill the operator at that very moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web
from support.liveapi import connection_of

WRITES = frozenset({"POST", "PATCH", "DELETE", "PUT"})
HOP_BY_HOP = frozenset({"transfer-encoding", "connection", "content-encoding", "content-length", "keep-alive"})


@dataclass
class Answer:
    """What the proxy says instead of the API server."""

    status: int
    reason: str = "InternalError"
    retry_after: int | None = None

    def response(self) -> web.Response:
        body = {
            "kind": "Status",
            "status": "Failure",
            "code": self.status,
            "reason": self.reason,
            "message": "injected",
        }
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after is not None else {}
        return web.Response(status=self.status, text=json.dumps(body), content_type="application/json", headers=headers)


Fault = Callable[[web.Request], Answer | None]
Moment = Callable[[int, web.Request], None]


def nothing(request: web.Request) -> Answer | None:
    """Pass everything on."""
    return None


def sometimes(share: float, *answers: Answer, seed: int = 7) -> Fault:
    """Fail a share of all requests that are not watches."""
    chance = random.Random(seed)

    def fault(request: web.Request) -> Answer | None:
        if "watch" in request.query or chance.random() >= share:
            return None
        # A conflict is an answer to a write only.
        return chance.choice([answer for answer in answers if answer.status != 409 or request.method in WRITES])

    return fault


@dataclass
class FaultProxy:
    """The proxy; its behaviour may be changed while it runs."""

    upstream: Path
    """Kubeconfig of the user in whose name requests go on."""
    fault: Fault = nothing
    before: Moment = lambda number, request: None
    after: Moment = lambda number, request: None
    is_down: bool = False
    """Whether every connection is cut at once."""
    requests: int = 0
    failed: int = 0
    writes: list[str] = field(default_factory=list)
    port: int = 0
    _open: set[asyncio.Transport] = field(default_factory=set)
    _server: str = ""
    _session: Any = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """One request. A connection that breaks, ours to the operator or on purpose, is no error of the proxy."""
        try:
            return await self._handle(request)
        except (ConnectionError, aiohttp.ClientError):
            if isinstance(request.transport, asyncio.Transport):
                request.transport.abort()
            return web.Response()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        if self.is_down:
            self._cut(request)
        if (answer := self.fault(request)) is not None:
            self.failed += 1
            return answer.response()
        # Reviews of tokens store nothing, and events follow what matters: dying around them would test nothing.
        counts = request.method in WRITES and not request.path.endswith(("/events", "/tokenreviews"))
        number = len(self.writes)
        if counts:
            self.writes.append(f"{request.method} {request.path}")
            self.before(number, request)
        transport = request.transport
        assert isinstance(transport, asyncio.Transport)
        self._open.add(transport)
        try:
            return await self._pass_on(request, number if counts else None)
        finally:
            self._open.discard(transport)

    async def _pass_on(self, request: web.Request, number: int | None) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in ("host", "connection")}
        async with self._session.request(
            request.method,
            self._server + request.path_qs,
            headers=headers,
            data=await request.read() or None,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
        ) as upstream:
            answer = web.StreamResponse(
                status=upstream.status,
                headers={name: value for name, value in upstream.headers.items() if name.lower() not in HOP_BY_HOP},
            )
            if number is not None:
                whole = await upstream.read()
                self.after(number, request)
                await answer.prepare(request)
                await answer.write(whole)
                return answer
            await answer.prepare(request)
            async for chunk in upstream.content.iter_any():
                await answer.write(chunk)
            return answer

    def go_down(self) -> None:
        """Cut every connection, and every one that is tried, until `come_up`."""
        self.is_down = True
        for transport in list(self._open):
            transport.abort()

    def come_up(self) -> None:
        self.is_down = False

    def _cut(self, request: web.Request) -> None:
        transport = request.transport
        if isinstance(transport, asyncio.Transport):
            transport.abort()
        raise ConnectionResetError

    def kubeconfig(self, path: Path) -> Path:
        """Write a kubeconfig that leads through the proxy."""
        cluster = {"name": "proxy", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [cluster],
            "users": [{"name": "nobody", "user": {}}],
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "nobody"}}],
            "current-context": "proxy",
        }
        path.write_text(yaml.safe_dump(config))
        return path


@asynccontextmanager
async def fault_proxy(upstream: Path) -> AsyncIterator[FaultProxy]:
    """A running proxy."""
    proxy = FaultProxy(upstream)
    connection = connection_of(upstream)
    proxy._server = connection.server
    app = web.Application(client_max_size=8 * 1024 * 1024)
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    async with connection.session() as session:
        proxy._session = session
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        proxy.port = runner.addresses[0][1]
        try:
            yield proxy
        finally:
            with contextlib.suppress(Exception):
                proxy.go_down()
            await runner.cleanup()
