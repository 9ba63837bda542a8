"""Credentials for the API server: a pod's service account, a kubeconfig elsewhere; the same for kopf and for us."""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.request import getproxies

import aiohttp
import kopf

SERVICE_ACCOUNT_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
TOKEN_REREAD_SECONDS = 60.0
RELOGIN = timedelta(minutes=15)
"""How long kopf may use what it read: a projected token is renewed long before it ends."""
CONNECTIONS_MAX = 32


class LoginError(Exception):
    """There are no credentials for an API server."""


@dataclass(slots=True)
class Connection:
    """Where the API server is and how to prove who we are."""

    info: kopf.ConnectionInfo
    token_file: Path | None = None
    _token: str | None = None
    _read_at: float = 0.0

    @property
    def server(self) -> str:
        """Base URL."""
        return str(self.info.server).rstrip("/")

    def headers(self) -> dict[str, str]:
        """Headers of one request. A token that is kept in a file is read again, because it is renewed there."""
        if self.token_file is None:
            return dict(self.info.as_http_headers())
        now = time.monotonic()
        if self._token is None or now - self._read_at > TOKEN_REREAD_SECONDS:
            self._token, self._read_at = self.token_file.read_text().strip(), now
        return {"Authorization": f"Bearer {self._token}"}

    def forget_token(self) -> None:
        """Read the token again before the next request, because this one was refused."""
        self._token = None

    def ssl_context(self) -> ssl.SSLContext:
        """Trust and client certificate."""
        context: ssl.SSLContext = self.info.as_ssl_context()
        return context

    def session(self) -> aiohttp.ClientSession:
        """A new session; the caller closes it. Authorization is set by each request."""
        # With trust_env aiohttp looks for a ~/.netrc before every request, in a thread: only where a proxy asks for it.
        has_proxy = bool(getproxies().keys() & {"http", "https", "all"})
        connector = aiohttp.TCPConnector(limit=CONNECTIONS_MAX, ssl=self.ssl_context(), keepalive_timeout=60)
        return aiohttp.ClientSession(connector=connector, trust_env=has_proxy)


def login(settings: kopf.OperatorSettings) -> Connection:
    """Find credentials.

    Raises:
        LoginError: if there are none.
    """
    if SERVICE_ACCOUNT_TOKEN.exists():
        info = kopf.login_with_service_account(settings=settings)
        if info is not None:
            return Connection(info, SERVICE_ACCOUNT_TOKEN)
    info = kopf.login_with_kubeconfig(settings=settings)
    if info is None:
        raise LoginError(
            "no credentials for an API server: there is neither a service account (run in a pod) nor a kubeconfig "
            "(set KUBECONFIG or write ~/.kube/config)"
        )
    return Connection(info)


def kopf_credentials(settings: kopf.OperatorSettings) -> kopf.ConnectionInfo:
    """What kopf's own watches log in with; read again before a token runs out."""
    connection = login(settings)
    if connection.token_file is not None:
        return replace(connection.info, expiration=datetime.now(UTC) + RELOGIN)
    return connection.info
