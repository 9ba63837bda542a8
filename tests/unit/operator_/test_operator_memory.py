"""What the operator keeps: the cache, run records, status patches, settings, health."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plumbline_operator.cache import Cache
from plumbline_operator.configuration import OperatorSettings
from plumbline_operator.errors import ReobserveError
from plumbline_operator.handlers.watching import ENDING_SECONDS, Watcher
from plumbline_operator.health import Health
from plumbline_operator.kube import RECORDS
from plumbline_operator.metrics import Metrics
from plumbline_operator.record import ForeignRecordError, RecordStore, read_record, render_record
from plumbline_operator.statuspatch import merge_patch
from support.controlling import Cluster
from support.fakekube import FakeKube, merge
from support.pipelines import pipeline_body, runtime_body

KEY = ("team-a", "assistant")
UID = "0b9b5a4e-0000-4000-8000-000000000001"


def pipeline(version: int, uid: str = UID, **metadata: Any) -> dict[str, Any]:
    body = pipeline_body(uid=uid)
    body["metadata"] |= {"resourceVersion": str(version), **metadata}
    return body


def job(version: int, name: str = "run-sft-1", uid: str = "job-1", owner: str = UID, **status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "namespace": "team-a",
            "uid": uid,
            "resourceVersion": str(version),
            "labels": {"plumbline.dev/role": "stage", "plumbline.dev/pipeline-uid": owner},
            "annotations": {"plumbline.dev/attempt": "1", "plumbline.dev/fingerprint": "f1"},
            "ownerReferences": [{"kind": "AlignmentPipeline", "name": "assistant", "uid": owner, "controller": True}],
        },
        "status": status,
    }


def test_only_a_newer_version_replaces_an_object() -> None:
    cache = Cache()
    assert cache.put_pipeline(pipeline(5))
    assert not cache.put_pipeline(pipeline(5))
    assert not cache.put_pipeline(pipeline(4))
    assert cache.put_pipeline(pipeline(12)), "versions are numbers, not texts"
    stored = cache.pipeline(KEY)
    assert stored is not None
    assert stored.resource_version == 12


def test_what_is_gone_does_not_come_back_with_a_late_answer() -> None:
    cache = Cache()
    cache.put_pipeline(pipeline(5))
    cache.drop_pipeline(KEY, UID)
    assert not cache.put_pipeline(pipeline(6))
    assert cache.put_pipeline(pipeline(7, uid="another")), "a new object of the same name is another one"
    cache.drop_pipeline(KEY, UID)
    assert cache.pipeline(KEY) is not None
    cache.put_job(job(5))
    cache.drop_job("team-a", "run-sft-1", "job-1")
    assert cache.put_job(job(6)) is None
    assert cache.jobs_of(UID) == []


def test_a_pass_cannot_change_what_is_kept() -> None:
    cache = Cache()
    cache.put_pipeline(pipeline(5, managedFields=[{"manager": "kubectl"}]))
    stored = cache.pipeline(KEY)
    assert stored is not None
    stored.body()["spec"]["seed"] = 99
    assert "seed" not in stored.body()["spec"]
    assert "managedFields" not in stored.body()["metadata"]


def test_a_listing_drops_what_is_gone_but_not_what_came_after_it() -> None:
    cache = Cache()
    cache.put_job(job(5, "old", "job-1"))
    cache.put_job(job(20, "new", "job-2"))
    gone = cache.forget_jobs_but([], version=10)
    assert [facts.name for facts in gone] == ["old"]
    assert [facts.name for facts in cache.jobs_of(UID)] == ["new"]


def test_twins_are_running_stages_of_other_pipelines_that_own_them() -> None:
    cache = Cache()
    cache.put_job(job(5, "mine", "job-1", active=1, ready=1))
    cache.put_job(job(6, "other", "job-2", owner="alp-2", active=1, ready=1))
    cache.put_job(job(7, "waits", "job-3", owner="alp-3", active=1))
    assert cache.running_fingerprints("team-a", but_of=UID) == {"f1"}
    assert cache.running_fingerprints("team-a", but_of="alp-2") == {"f1"}
    cache.drop_job("team-a", "other", "job-2")
    assert cache.running_fingerprints("team-a", but_of=UID) == frozenset()
    forged = job(9, "forged", "job-4", owner="alp-4", active=1, ready=1)
    forged["metadata"]["ownerReferences"] = []
    cache.put_job(forged)
    assert cache.running_fingerprints("team-a", but_of=UID) == frozenset()


def test_of_two_default_runtimes_the_newest_counts() -> None:
    cache = Cache()
    for version, (name, created) in enumerate((("a", "2026-01-01T00:00:00Z"), ("b", "2026-02-01T00:00:00Z"))):
        body = runtime_body(name=name)
        body["metadata"] |= {"uid": name, "resourceVersion": str(version + 1), "creationTimestamp": created}
        cache.put_runtime(body)
    runtime, problem = cache.default_runtime()
    assert runtime is not None
    assert (runtime.metadata.name, problem) == ("b", None)
    cache.drop_runtime("b", "b")
    runtime, _ = cache.default_runtime()
    assert runtime is not None
    assert runtime.metadata.name == "a"
    assert "Runtimes of this cluster: a" in str(cache.runtime("c")[1])


async def test_an_ending_job_waits_for_its_end_before_it_is_looked_at() -> None:
    cache = Cache()
    cache.put_pipeline(pipeline(1))
    asked: list[tuple[tuple[str, str], float]] = []
    watcher = Watcher(cache, lambda key, delay: asked.append((key, delay)))
    await watcher.job_event({"type": "MODIFIED", "object": job(5, uncountedTerminatedPods={"succeeded": ["p"]})})
    ended = {"type": "Complete", "status": "True", "lastTransitionTime": "2026-01-01T12:00:00Z"}
    await watcher.job_event({"type": "MODIFIED", "object": job(6, conditions=[ended])})
    await watcher.job_event({"type": "MODIFIED", "object": job(6, conditions=[ended])})
    assert asked == [(KEY, ENDING_SECONDS), (KEY, 0.0)]


async def test_a_status_that_we_wrote_ourselves_triggers_nothing() -> None:
    cache = Cache()
    asked: list[tuple[str, str]] = []
    watcher = Watcher(cache, lambda key, delay: asked.append(key))
    cache.put_pipeline(pipeline(8))
    await watcher.pipeline_event({"type": "MODIFIED", "object": pipeline(8)})
    assert asked == []
    await watcher.pipeline_event({"type": "MODIFIED", "object": pipeline(9)})
    assert asked == [KEY]


# Records.


async def a_record() -> Any:
    cluster = Cluster()
    await cluster.reconcile()
    (revision,) = cluster.kube.of(RECORDS)
    return revision


async def test_a_record_comes_back_as_it_was_frozen() -> None:
    revision = await a_record()
    record = read_record(revision, uid=UID)
    again = render_record(record)
    assert again["data"] == revision["data"]
    assert again["metadata"]["annotations"] == revision["metadata"]["annotations"]
    kube = FakeKube()
    store = RecordStore(kube)
    await store.freeze(record)
    await store.freeze(record)
    assert len(kube.writes) == 1
    place = {"namespace": "team-a", "pipeline": "assistant", "uid": UID}
    assert await RecordStore(kube).load(**place, generation=1) == record
    assert await store.load(**place, generation=2) is None
    assert await store.load_before(namespace="team-a", uid=UID, generation=2) == record
    assert await store.load_before(namespace="team-a", uid=UID, generation=1) is None


@pytest.mark.parametrize(
    "forge",
    [
        lambda r: r["data"].update(seed=99),
        lambda r: r["metadata"].update(ownerReferences=[]),
        lambda r: r["metadata"]["ownerReferences"][0].update(uid="another"),
        lambda r: r.update(revision=2),
        lambda r: r["metadata"].update(name="another"),
        lambda r: r.update(data={"seed": 1}),
        lambda r: r["metadata"].update(annotations={}),
    ],
)
async def test_a_forged_record_is_not_used(forge: Any) -> None:
    revision = await a_record()
    forge(revision)
    with pytest.raises(ForeignRecordError, match="ControllerRevision team-a/"):
        read_record(revision, uid=UID)


async def test_another_record_of_the_same_generation_ends_the_pass() -> None:
    record = read_record(await a_record(), uid=UID)
    kube = FakeKube()
    await RecordStore(kube).freeze(record)
    with pytest.raises(ReobserveError):
        await RecordStore(kube).freeze(record.model_copy(update={"seed": 3}))


# Status patches.

json_values = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
    max_leaves=12,
)
documents = st.dictionaries(st.sampled_from("abcd"), json_values, max_size=4)


@given(documents, documents)
def test_the_patch_turns_one_status_into_the_other(stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    patched = copy.deepcopy(stored)
    merge(patched, merge_patch(stored, wanted))
    assert patched == wanted
    assert merge_patch(wanted, wanted) == {}


# Settings and health.


def test_settings_come_from_the_environment() -> None:
    settings = OperatorSettings.from_environment(
        {"PLUMBLINE_WORKERS": "3", "PLUMBLINE_SERVICE_NAME": "plumbline", "PLUMBLINE_NAMESPACE": "system"}
    )
    assert settings.workers == 3
    assert settings.progress_base_url == "https://plumbline.system.svc"
    assert OperatorSettings.from_environment({}).progress_base_url is None
    assert OperatorSettings.from_environment({"PLUMBLINE_PROGRESS_TLS_DIR": "/tls"}).tls_folder == Path("/tls")


@pytest.mark.parametrize(
    ("environment", "words"),
    [({"PLUMBLINE_WORKERS": "many"}, 'PLUMBLINE_WORKERS="many"'), ({"PLUMBLINE_WORKERS": "0"}, "at least 1")],
)
def test_a_wrong_setting_is_named(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OperatorSettings.from_environment(environment)


async def test_health_fails_when_the_loop_stalls_and_readiness_before_the_first_listing() -> None:
    stalled, ready = [0.0], [False]
    health = Health(lambda: stalled[0], 300.0, lambda: ready[0])
    request: Any = None
    assert (await health.healthz(request)).status == 200
    assert (await health.readyz(request)).status == 503
    stalled[0], ready[0] = 301.0, True
    assert (await health.healthz(request)).status == 503
    assert (await health.readyz(request)).status == 200


def test_metrics_have_no_names_of_tenants_in_them() -> None:
    metrics = Metrics()
    metrics.count_request("create", "jobs", 201)
    text = metrics.render().decode()
    assert 'plumbline_api_requests_total{code="201",resource="jobs",verb="create"} 1.0' in text
    labels = {name for family in metrics.registry.collect() for s in family.samples for name in s.labels}
    assert labels <= {
        "verb", "resource", "code", "reason", "type", "outcome", "answer", "le", "version", "generation",
        "implementation", "major", "minor", "patchlevel",
    }  # fmt: skip
