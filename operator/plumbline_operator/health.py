"""Plain HTTP for the cluster: /healthz and /readyz for probes, /metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from plumbline_operator.metrics import CONTENT_TYPE, Metrics

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class Health:
    """Whether the process is alive and ready. Alive means that its loop moves, not only that the process is there."""

    stalled_seconds: Callable[[], float]
    """Seconds since the last sign of life, while there was something to do."""
    limit_seconds: float
    is_ready: Callable[[], bool]

    async def healthz(self, _: web.Request) -> web.Response:
        """200 while the loop moves."""
        stalled = self.stalled_seconds()
        if stalled > self.limit_seconds:
            return web.Response(status=503, text=f"stalled: no pass has ended for {stalled:.0f} s\n")
        return web.Response(text="ok\n")

    async def readyz(self, _: web.Request) -> web.Response:
        """200 once the first listing is complete."""
        if self.is_ready():
            return web.Response(text="ok\n")
        return web.Response(status=503, text="the first listing is not complete\n")


async def serve_health(health: Health, address: str, port: int) -> web.AppRunner:
    """Start the server for probes; the caller cleans it up."""
    return await _serve({"/healthz": health.healthz, "/readyz": health.readyz}, address, port)


async def serve_metrics(metrics: Metrics, address: str, port: int) -> web.AppRunner:
    """Start the server for metrics; the caller cleans it up."""

    async def show(_: web.Request) -> web.Response:
        return web.Response(body=metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    return await _serve({"/metrics": show}, address, port)


async def _serve(routes: dict[str, Handler], address: str, port: int) -> web.AppRunner:
    app = web.Application()
    for path, handler in routes.items():
        app.router.add_get(path, handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, address or None, port).start()
    return runner
