"""An operator process against a real API server and real controllers; a fake kubelet in place of a node."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from plumbline_operator.errors import NotFoundError
from plumbline_operator.kube import JOBS, PIPELINES
from support.cluster_fixtures import ControlPlane
from support.fakekubelet import FakeKubelet
from support.liveapi import LiveApi, eventually, live_api
from support.operatorprocess import OperatorProcess, install
from support.pipelines import pipeline_body

OPERATORS = ("operator-a", "operator-b")
ENDED = ("Succeeded", "Failed", "Refused")


@pytest.fixture(scope="session")
def installed(control_plane: ControlPlane) -> ControlPlane:
    """The control plane with CRDs, a default runtime and rights for two operators."""
    install(control_plane, *OPERATORS)
    return control_plane


@pytest.fixture
async def api(installed: ControlPlane) -> AsyncIterator[LiveApi]:
    async with live_api(installed.kubeconfig) as client:
        yield client


@pytest.fixture
async def kubelet(api: LiveApi) -> AsyncIterator[FakeKubelet]:
    async with FakeKubelet(api) as found:
        yield found


def end(operator: OperatorProcess) -> None:
    """End an operator if it runs; it must do so when asked, and have found nothing wrong with itself."""
    if operator.process is not None and operator.process.poll() is None:
        assert operator.stop() == 0, operator.tail()
        assert not operator.defects(), operator.tail()


@pytest.fixture
def idle_operator(installed: ControlPlane, tmp_path: Path) -> Iterator[OperatorProcess]:
    """An operator of the test's own, not started yet."""
    operator = OperatorProcess(installed.kubeconfig_for(tmp_path / "kubeconfig", OPERATORS[0]), tmp_path)
    yield operator
    end(operator)


@pytest.fixture(scope="module")
def operator(installed: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """A running operator for all tests of a module."""
    folder = tmp_path_factory.mktemp("operator")
    operator = OperatorProcess(installed.kubeconfig_for(folder / "kubeconfig", OPERATORS[0]), folder)
    operator.start()
    operator.wait_until_ready()
    yield operator
    end(operator)


@dataclass
class Tenant:
    """What a user does and sees in a namespace."""

    api: LiveApi
    namespace: str
    log: OperatorProcess | None = None
    seen: dict[str, Any] = field(default_factory=dict)
    """The pipeline as it was looked at last."""

    async def apply(self, name: str = "run", **fields: Any) -> dict[str, Any]:
        body = pipeline_body(name=name, namespace=self.namespace, **fields)
        for given_by_server in ("uid", "generation"):
            del body["metadata"][given_by_server]
        return await self.api.create(PIPELINES, body, self.namespace)

    async def edit(self, name: str = "run", **spec: Any) -> None:
        await self.api.patch(PIPELINES, name, self.namespace, {"spec": spec})

    async def see(self, name: str = "run") -> dict[str, Any]:
        self.seen = await self.api.get(PIPELINES, name, self.namespace)
        return self.seen

    async def phases(self, name: str = "run") -> dict[str, str]:
        status = (await self.see(name)).get("status") or {}
        return {entry["name"]: entry["phase"] for entry in status.get("stages", [])}

    async def stage(self, stage: str, name: str = "run") -> dict[str, Any]:
        status = (await self.see(name)).get("status") or {}
        return next((entry for entry in status.get("stages", []) if entry["name"] == stage), {})

    async def until(self, what: str, found: Any, seconds: float = 60) -> Any:
        return await eventually(what, found, seconds, explain=self._explain)

    def _explain(self) -> str:
        status = json.dumps(self.seen.get("status"), indent=1)
        return f"{status}\n{self.log.tail() if self.log else ''}"

    async def until_stage(self, stage: str, name: str = "run", seconds: float = 60, **wanted: Any) -> dict[str, Any]:
        async def found() -> dict[str, Any] | None:
            entry = await self.stage(stage, name)
            return entry if entry and all(entry.get(key) == value for key, value in wanted.items()) else None

        return await self.until(f"stage {stage} {wanted}", found, seconds)

    async def until_phase(self, *phases: str, name: str = "run", seconds: float = 90) -> dict[str, Any]:
        async def found() -> dict[str, Any] | None:
            pipeline = await self.see(name)
            return pipeline if (pipeline.get("status") or {}).get("phase") in phases else None

        return await self.until(f"phase {' or '.join(phases)}", found, seconds)

    async def until_ended(self, name: str = "run", seconds: float = 90) -> dict[str, Any]:
        return await self.until_phase(*ENDED, name=name, seconds=seconds)

    async def until_gone(self, name: str = "run", seconds: float = 60) -> None:
        async def gone() -> bool:
            try:
                await self.see(name)
            except NotFoundError:
                return True
            return False

        await self.until(f"{name} is gone", gone, seconds)

    async def jobs(self) -> list[dict[str, Any]]:
        return await self.api.list(JOBS, self.namespace)


@pytest.fixture
def tenant(request: pytest.FixtureRequest, api: LiveApi, namespace: str) -> Tenant:
    name = next((item for item in ("operator", "idle_operator") if item in request.fixturenames), None)
    return Tenant(api, namespace, request.getfixturevalue(name) if name else None)
