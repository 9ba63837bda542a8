"""An async client of a real API server for tests, and ways to wait for what it shows."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import kopf
import yaml
from plumbline_operator.connection import Connection
from plumbline_operator.kube import HttpKube, Resource

Manifest = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]


def connection_of(kubeconfig: Path) -> Connection:
    """Credentials in a kubeconfig with one cluster and one user."""
    config = yaml.safe_load(kubeconfig.read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    info = kopf.ConnectionInfo(
        server=cluster["server"],
        ca_path=cluster.get("certificate-authority"),
        ca_data=_plain(cluster.get("certificate-authority-data")),
        certificate_path=user.get("client-certificate"),
        certificate_data=_plain(user.get("client-certificate-data")),
        private_key_path=user.get("client-key"),
        private_key_data=_plain(user.get("client-key-data")),
        token=user.get("token"),
    )
    return Connection(info)


def _plain(data: str | None) -> str | None:
    return base64.b64decode(data).decode() if data else None


class LiveApi(HttpKube):
    """The real client, with what only tests need: watches and waits."""

    def __init__(self, kubeconfig: Path, agent: str = "plumbline-tests") -> None:
        super().__init__(connection_of(kubeconfig), timeout_seconds=30, agent=agent)

    async def list(self, resource: Resource, namespace: str | None = None, labels: str = "") -> list[Manifest]:
        return [item async for page in self.pages(resource, namespace, labels) for item in page.items]

    async def watch(self, resource: Resource, labels: str = "") -> AsyncIterator[tuple[str, Manifest]]:
        """Objects that are there, then every change of them, until cancelled."""
        import aiohttp

        version = ""
        while True:
            if not version:
                page = await self._request("list", resource, resource.path(None), query={"labelSelector": labels})
                version = page["metadata"]["resourceVersion"]
                for item in page.get("items") or []:
                    yield "ADDED", item
            query = {"watch": "1", "labelSelector": labels, "resourceVersion": version, "timeoutSeconds": "240"}
            assert self._session is not None
            async with self._session.get(
                self._connection.server + resource.path(None),
                params=query,
                headers=self._connection.headers(),
                timeout=aiohttp.ClientTimeout(total=None, sock_read=300),
            ) as response:
                version = ""
                buffer = b""
                async for chunk in response.content.iter_any():
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            break
                        yield event["type"], event["object"]


@asynccontextmanager
async def live_api(kubeconfig: Path) -> AsyncIterator[LiveApi]:
    """A client that is closed at the end."""
    api = LiveApi(kubeconfig)
    try:
        yield api
    finally:
        await api.close()


async def eventually(
    what: str, found: Callable[[], Any], seconds: float = 60.0, interval: float = 0.05, explain: Callable[[], str] = str
) -> Any:
    """Poll an (async) condition until it gives something true."""
    deadline = time.monotonic() + seconds
    while True:
        value = found()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s\n{explain()}"
        await asyncio.sleep(interval)


def crds() -> list[Manifest]:
    """The CRDs as they are committed."""
    return [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "crds").glob("*.yaml"))]
