"""Settings of the operator's process, from its environment."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from plumbline_operator.settings import PlanSettings

PREFIX = "PLUMBLINE_"


def software_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("plumbline")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0.0.0"


@dataclass(frozen=True, slots=True)
class OperatorSettings:
    """How this process runs. Every field but `plan` is set by the variable PLUMBLINE_<FIELD IN CAPITALS>."""

    log_level: str = "info"
    """debug, info, warning or error."""
    namespace: str = ""
    """Namespace that the operator runs in; with `service_name` it makes the address of the progress service."""
    service_name: str = ""
    """Service in front of the progress server."""
    identity: str = field(default_factory=socket.gethostname)
    """Who writes events: the pod's name."""
    bind_address: str = ""
    """Address to listen on; empty: every address."""
    metrics_port: int = 8080
    """Port of /metrics."""
    health_port: int = 8081
    """Port of /healthz and /readyz."""
    progress_port: int = 8443
    """Port of the progress server; 0 turns it off."""
    progress_url: str = ""
    """Base URL that pods reach the progress server at; empty: made of service_name and namespace."""
    progress_audience: str = "plumbline.dev/progress"
    """Audience of the tokens that pods show."""
    progress_tls_dir: str = ""
    """Folder with tls.crt, tls.key and ca.crt, such as a mounted Secret; it is read again when it changes. Empty: a
    certificate made at start, so pods of an operator before this one can no longer report progress."""
    workers: int = 8
    """Passes at the same time, each for another pipeline."""
    resync_seconds: float = 180.0
    """How often everything is listed and looked at again."""
    pass_timeout_seconds: float = 60.0
    """Longest time of one pass."""
    request_timeout_seconds: float = 20.0
    """Longest time of one request to the API server."""
    error_backoff_seconds: float = 0.5
    """Wait after the first failed pass of a pipeline; it doubles with every further one."""
    error_backoff_cap_seconds: float = 60.0
    """Longest wait between failed passes."""
    waiting_poll_seconds: float = 10.0
    """How often to look why a Job has no running pod."""
    refused_poll_seconds: float = 60.0
    """How often to try again to create a Job that the API server refused."""
    stall_seconds: float = 300.0
    """Age of the last sign of life after which the process counts as stalled."""
    retry_backoff_seconds: float = 10.0
    """Wait after the first failed attempt of a stage."""
    retry_backoff_cap_seconds: float = 300.0
    """Longest wait between attempts of a stage."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> OperatorSettings:
        """Read the settings.

        Raises:
            ValueError: naming the variable whose value does not fit.
        """
        given = os.environ if environment is None else environment
        values: dict[str, str | int | float] = {}
        for item in fields(cls):
            name = PREFIX + item.name.upper()
            text = given.get(name, "").strip()
            if not text:
                continue
            try:
                values[item.name] = {"int": int, "float": float}.get(str(item.type), str)(text)
            except ValueError as error:
                raise ValueError(f'{name}="{text}" is not a number') from error
        settings = cls(**values)  # type: ignore[arg-type]
        if settings.workers < 1:
            raise ValueError(f"{PREFIX}WORKERS={settings.workers}: at least 1 is needed")
        return settings

    @property
    def plan(self) -> PlanSettings:
        """What `plan` is told."""
        return PlanSettings(
            operator_version=software_version(),
            backoff_base_seconds=self.retry_backoff_seconds,
            backoff_cap_seconds=self.retry_backoff_cap_seconds,
        )

    @property
    def progress_base_url(self) -> str | None:
        """Where pods report progress; None where they do not."""
        if not self.progress_port:
            return None
        if self.progress_url:
            return self.progress_url
        return f"https://{self.progress_host}" if self.service_name and self.namespace else None

    @property
    def progress_host(self) -> str:
        """Host name in the certificate of the progress server."""
        return f"{self.service_name}.{self.namespace}.svc"

    @property
    def tls_folder(self) -> Path | None:
        """Folder of a mounted certificate."""
        return Path(self.progress_tls_dir) if self.progress_tls_dir else None
