"""Who may report progress, what a report may be, and what it costs the API server."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from plumbline_api.stagerun import TrainerStatus
from plumbline_operator.cache import Cache
from plumbline_operator.certificates import make_certificate
from plumbline_operator.errors import api_error
from plumbline_operator.kube import PODS, Manifest, Resource
from plumbline_operator.metrics import Metrics
from plumbline_operator.progress import ProgressServer, ProgressStore, view_of
from plumbline_operator.rendering import progress_path
from plumbline_operator.tokens import Bucket, TokenChecker
from support.fakekube import FakeKube

NAMESPACE, JOB = "team-a", "run-sft-0123456789"
AUDIENCE = "plumbline.dev/progress"
NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
REPORT = {
    "trainerStatus": {
        "progressPercentage": 40,
        "estimatedRemainingSeconds": 90,
        "metrics": [{"name": "loss", "value": "1.25"}],
        "message": "step 40/100",
        "lastUpdatedTime": "2026-01-01T12:00:00Z",
    }
}


def job(name: str = JOB, uid: str = "job-1", **status: Any) -> Manifest:
    return {
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "uid": uid,
            "resourceVersion": "7",
            "labels": {"plumbline.dev/role": "stage", "plumbline.dev/pipeline-uid": "alp-1"},
            "annotations": {"plumbline.dev/attempt": "1", "plumbline.dev/stage": "sft"},
            "ownerReferences": [{"kind": "AlignmentPipeline", "name": "run", "uid": "alp-1", "controller": True}],
        },
        "status": status,
    }


def user(pod: str = "pod-1", uid: str = "pod-uid-1", namespace: str = NAMESPACE) -> Manifest:
    return {
        "authenticated": True,
        "audiences": [AUDIENCE],
        "user": {
            "username": f"system:serviceaccount:{namespace}:default",
            "extra": {
                "authentication.kubernetes.io/pod-name": [pod],
                "authentication.kubernetes.io/pod-uid": [uid],
            },
        },
    }


class Door:
    """The server, what is behind it, and a client in front."""

    def __init__(self) -> None:
        self.kube = FakeKube()
        self.cache = Cache()
        self.cache.put_job(job())
        self.add_pod("pod-1", "pod-uid-1", "job-1")
        self.kube.reviews["good"] = user()
        self.moment = 1000.0
        self.checker = TokenChecker(self.kube, self.cache, AUDIENCE, clock=lambda: self.moment)
        self.checker.bucket = Bucket(20.0, 100.0, lambda: self.moment)
        self.store = ProgressStore()
        self.enqueued: list[tuple[str, str]] = []
        self.server = ProgressServer(self.checker, self.store, self.enqueued.append, Metrics(), now=lambda: NOW)
        self.certificate = make_certificate("127.0.0.1")
        self.port = 0

    def add_pod(self, name: str, uid: str, job_uid: str, kind: str = "Job") -> None:
        owner = {"kind": kind, "name": JOB, "uid": job_uid, "controller": True}
        self.kube.add(PODS, {"metadata": {"name": name, "uid": uid, "ownerReferences": [owner]}}, NAMESPACE)

    async def post(
        self, token: str | None = "good", report: Any = REPORT, *, name: str = JOB, path: str = "", data: bytes = b""
    ) -> int:
        trust = ssl.create_default_context(cadata=self.certificate.authority_pem)
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        url = f"https://127.0.0.1:{self.port}{path or progress_path(NAMESPACE, name)}"
        body: dict[str, Any] = {"data": data} if data else {"json": report}
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, headers=headers, ssl=trust, **body) as response,
        ):
            await response.read()
            self.headers = response.headers
            return response.status


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    found = Door()
    runner = await found.server.serve("127.0.0.1", 0, found.certificate.context)
    found.port = runner.addresses[0][1]
    yield found
    await runner.cleanup()


async def test_a_report_is_kept_and_the_pipeline_looked_at(door: Door) -> None:
    assert await door.post() == 204
    (view,) = door.store.of("alp-1")
    assert (view.job, view.progress.percentage, view.progress.message) == (JOB, 40, "step 40/100")
    assert view.progress.finish_time == "2026-01-01T12:01:30Z"
    assert view.metrics == (("loss", "1.25"),)
    assert door.enqueued == [(NAMESPACE, "run")]


async def test_a_known_token_costs_no_further_request(door: Door) -> None:
    for _ in range(3):
        assert await door.post() == 204
    assert door.kube.reads["review"] == 1
    assert door.kube.reads["get pods"] == 1
    door.moment += 400
    assert await door.post() == 204
    assert door.kube.reads["review"] == 2, "an answer is not trusted for ever"


@pytest.mark.parametrize("token", [None, "", "made-up", "x" * 7_000])
async def test_strangers_are_refused(door: Door, token: str | None) -> None:
    assert await door.post(token) == 401
    assert not door.store.of("alp-1")
    assert not door.enqueued


async def test_strangers_learn_no_paths(door: Door) -> None:
    assert await door.post(None, path="/v1/progress") == 401
    assert await door.post(None, path="/") == 401
    assert await door.post("good", path="/v1/progress") == 404


async def test_a_token_for_another_audience_is_refused(door: Door) -> None:
    door.kube.reviews["other"] = user() | {"audiences": ["https://kubernetes.default.svc"]}
    assert await door.post("other") == 401


async def test_a_token_of_another_namespace_is_refused(door: Door) -> None:
    door.kube.reviews["other"] = user(namespace="team-b")
    assert await door.post("other") == 403


async def test_a_pod_of_another_job_is_refused(door: Door) -> None:
    door.add_pod("pod-2", "pod-uid-2", "job-2")
    door.kube.reviews["other"] = user("pod-2", "pod-uid-2")
    assert await door.post("other") == 403
    door.cache.put_job(job("run-dpo-0123456789", "job-2"))
    assert await door.post("other", name="run-dpo-0123456789") == 204
    assert await door.post("other") == 403


async def test_a_pod_that_was_made_again_under_its_name_is_refused(door: Door) -> None:
    door.kube.reviews["old"] = user("pod-1", "pod-uid-0")
    assert await door.post("old") == 403


async def test_a_pod_that_belongs_to_no_job_is_refused(door: Door) -> None:
    door.add_pod("pod-3", "pod-uid-3", "job-1", kind="ReplicaSet")
    door.kube.reviews["other"] = user("pod-3", "pod-uid-3")
    assert await door.post("other") == 403


async def test_a_token_that_is_bound_to_no_pod_is_refused(door: Door) -> None:
    review = user()
    del review["user"]["extra"]
    door.kube.reviews["loose"] = review
    assert await door.post("loose") == 403


async def test_an_unknown_and_an_ended_job_take_no_reports(door: Door) -> None:
    assert await door.post(name="no-such-job") == 403
    ended = {"conditions": [{"type": "Complete", "status": "True", "lastTransitionTime": "2026-01-01T12:00:00Z"}]}
    door.cache.put_job(job() | {"metadata": job()["metadata"] | {"resourceVersion": "9"}, "status": ended})
    assert await door.post() == 403


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"not json", 400),
        (b'{"trainerStatus": {"progressPercentage": 400}}', 400),
        (b'{"trainerStatus": {"metrics": [{"name": "n", "value": "' + b"9" * 500 + b'"}]}}', 400),
        (b"{" + b" " * 20_000 + b"}", 413),
    ],
)
async def test_what_is_no_report_is_refused(door: Door, data: bytes, status: int) -> None:
    assert await door.post(data=data) == status
    assert not door.store.of("alp-1")


async def test_too_many_reports_are_put_off(door: Door) -> None:
    answers = [await door.post() for _ in range(8)]
    assert answers == [204] * 5 + [429] * 3
    assert int(door.headers["Retry-After"]) >= 1
    door.moment += 2
    assert await door.post() == 204


async def test_guessing_tokens_does_not_flood_the_api_server(door: Door) -> None:
    answers = [await door.post(f"guess-{number}") for number in range(130)]
    assert answers[:100] == [401] * 100
    assert set(answers[100:]) == {429}
    assert door.kube.reads["review"] == 100


async def test_an_unreachable_api_server_is_nobodys_fault(door: Door) -> None:
    def fail(resource: Resource) -> None:
        raise api_error(503, "", "down")

    door.kube.on_read = fail
    assert await door.post() == 503
    door.kube.on_read = lambda resource: None
    assert await door.post() == 204


async def test_the_certificate_is_for_the_service_and_nobody_else(door: Door) -> None:
    trust = ssl.create_default_context(cadata=door.certificate.authority_pem)
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await session.post(f"https://localhost:{door.port}/", ssl=trust)
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await session.post(f"https://127.0.0.1:{door.port}/", ssl=ssl.create_default_context())


def test_absent_and_absurd_estimates_are_no_finish_time() -> None:
    assert view_of(JOB, TrainerStatus(), NOW).progress.finish_time is None
    assert view_of(JOB, TrainerStatus(estimated_remaining_seconds=1e300), NOW).progress.finish_time is None
    assert view_of(JOB, TrainerStatus(), NOW).progress.percentage == 0


def test_reports_go_with_their_job_and_pipeline() -> None:
    door = Door()
    facts = door.cache.job(NAMESPACE, JOB)
    assert facts is not None
    door.store.put(facts, view_of(JOB, TrainerStatus(progress_percentage=3), NOW))
    door.store.forget_job(NAMESPACE, JOB)
    assert door.store.of("alp-1") == []
    door.store.put(facts, view_of(JOB, TrainerStatus(progress_percentage=3), NOW))
    door.store.forget_pipeline("alp-1")
    assert door.store.of("alp-1") == []
