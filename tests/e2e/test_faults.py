"""Whatever dies meanwhile, a run ends with the same bits, no Job is made twice, and work that was saved is not done again."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from support.reference import Reference, weights_of
from support.release import Release
from support.tenant import Run, Tenant, stage_status
from support.tinypipeline import CHECKPOINT_EVERY, LONG_STAGE, LONG_STEPS, STAGE_NAMES
from support.trainerprocesses import kill_first_process, kill_worker

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

ALL = ("preflight", *STAGE_NAMES, "finalize")
SEED = 20261121
"""Of the moments at which the operator dies."""


def assert_nothing_ran_twice(run: Run) -> None:
    """Each step has one Job, created once, with one pod, whose trainer was started once."""
    assert Counter(name for _, name in run.jobs_created()) == dict.fromkeys(ALL, 1)
    creates = run.tenant.creates("jobs")
    assert set(creates.values()) == {1}, creates
    assert sum(run.tenant.creates("pods").values()) == len(ALL)
    for name in STAGE_NAMES:
        [result] = run.results(name)
        assert (result["outcome"], result["reused"], result.get("firstStep", 0)) == ("Succeeded", False, 0)


def assert_same_end(run: Run, reference: Reference, *stages: str) -> None:
    """The stages' weights are those of a run that nothing disturbed."""
    for name in stages:
        assert weights_of(run.output(name)) == weights_of(reference.output(name)), name


def test_the_operator_dies_after_every_stage(release: Release, tenant: Tenant, reference: Reference) -> None:
    """As soon as the pod of each has ended, by SIGTERM and by SIGKILL in turn."""
    run = tenant.run(tenant.manifest("tiny"))
    for number, name in enumerate(("preflight", *STAGE_NAMES)):
        run.until(f"the pod of {name} ends", lambda _, name=name: ended_pods(run, name))
        release.kill_operator(force=number % 2 == 0)
    run.until_succeeded()
    assert_nothing_ran_twice(run)
    assert_same_end(run, reference, "domain", "sft", "dpo", "final")
    release.wait_ready()


def ended_pods(run: Run, stage: str) -> bool:
    return any(pod["status"].get("phase") == "Succeeded" for pod in run.pods(stage))


def test_the_operator_dies_at_random_stage_ends(release: Release, tenant: Tenant, reference: Reference) -> None:
    """Between two stages: some time after the pod has ended, while the operator counts the end and starts the next."""
    chance = random.Random(SEED)
    run = tenant.run(tenant.manifest("tiny"))
    for name in sorted(chance.sample(("preflight", *STAGE_NAMES), 3), key=ALL.index):
        if chance.random() < 0.5:
            run.until(f"{name} has succeeded", lambda status, name=name: _phase(status, name) == "Succeeded")
        else:
            after = ALL[ALL.index(name) + 1]
            run.until(
                f"the Job of {after} is there", lambda _, after=after: (_role(after), after) in run.jobs_created()
            )
        release.kill_operator(force=chance.random() < 0.5)
    run.until_succeeded()
    assert_nothing_ran_twice(run)
    assert_same_end(run, reference, "final")
    release.wait_ready()


def _role(name: str) -> str:
    return name if name in ("preflight", "finalize") else "stage"


def _phase(status: dict[str, object], stage: str) -> str | None:
    found: str | None = stage_status(status, stage).get("phase")
    return found


@dataclass(frozen=True)
class Interruption:
    """A way in which the pod of a stage goes away while it trains."""

    name: str
    strike: Callable[[Run], None]
    attempts: int
    """Jobs that the stage then needs."""
    failures: int
    """Attempts that count against `retries`."""
    first: str | None
    """How the first attempt says that it ended; None: it could say nothing."""


def delete_pod(*grace: str) -> Callable[[Run], None]:
    def strike(run: Run) -> None:
        [pod] = run.pods(LONG_STAGE)
        run.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false", *grace)

    return strike


def evict_pod(run: Run) -> None:
    """As a drain of the node does."""
    [pod] = run.pods(LONG_STAGE)
    name = pod["metadata"]["name"]
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": name, "namespace": run.tenant.namespace},
    }
    path = f"/api/v1/namespaces/{run.tenant.namespace}/pods/{name}/eviction"
    run.kubectl("create", f"--raw={path}", "-f", "-", stdin=json.dumps(eviction))


INTERRUPTIONS = (
    Interruption("deleted", delete_pod("--grace-period=40"), attempts=2, failures=0, first="Stopped"),
    Interruption("forced", delete_pod("--grace-period=0", "--force"), attempts=2, failures=0, first=None),
    Interruption("evicted", evict_pod, attempts=1, failures=0, first=None),
    Interruption("killed", lambda run: kill_first_process(run.uid, LONG_STAGE), attempts=2, failures=1, first=None),
    Interruption("rank", lambda run: kill_worker(run.uid, LONG_STAGE), attempts=2, failures=1, first="Failed"),
)


def test_a_trainer_that_is_interrupted_resumes_and_ends_with_the_same_bits(
    tenants: Callable[[str], Tenant], reference: Reference
) -> None:
    """All interruptions beside each other, each in a namespace of its own."""
    runs = {}
    for way in INTERRUPTIONS:
        tenant = tenants(way.name)
        runs[way.name] = tenant.run(tenant.manifest("tiny", stages=(LONG_STAGE,)))
    steps_done = {}
    for way in INTERRUPTIONS:
        run = runs[way.name]
        run.until(
            "a checkpoint is committed",
            lambda _, run=run: run.checkpoints(LONG_STAGE),
        )
        log = run.kubectl("logs", run.pods(LONG_STAGE)[0]["metadata"]["name"])
        steps_done[way.name] = max(int(step) for step in re.findall(rf"step (\d+)/{LONG_STEPS}", log))
        way.strike(run)
    for way in INTERRUPTIONS:
        run = runs[way.name]
        status = run.until_succeeded()
        entry = stage_status(status, LONG_STAGE)
        assert (entry["attempt"], entry["failures"]) == (way.attempts, way.failures), f"{way.name}\n{run.explain()}"
        assert len([name for _, name in run.jobs_created() if name == LONG_STAGE]) == way.attempts
        assert set(run.tenant.creates("jobs").values()) == {1}
        results = run.results(LONG_STAGE)
        last = results[-1]
        assert last["outcome"] == "Succeeded"
        assert not last["reused"]
        # The second process went on where the first had saved, so the two together did less than two runs' steps.
        assert CHECKPOINT_EVERY <= last["firstStep"] < LONG_STEPS, way.name
        assert last["lastStep"] == LONG_STEPS
        assert steps_done[way.name] + (last["lastStep"] - last["firstStep"]) < 2 * LONG_STEPS
        if way.first is not None:
            assert results[0]["outcome"] == way.first, way.name
        if way.first == "Stopped":
            assert results[0]["lastStep"] == last["firstStep"], "a stop writes a checkpoint, so no step is done twice"
        assert_same_end(run, reference, LONG_STAGE)


def test_a_finished_pod_is_deleted_before_its_message_is_read(
    release: Release, tenant: Tenant, reference: Reference
) -> None:
    run = tenant.run(tenant.manifest("tiny", stages=(LONG_STAGE, "sft")))
    run.until("the stage trains", lambda _: run.checkpoints(LONG_STAGE))
    release.scale(0)
    try:
        [job] = run.jobs()
        run.kubectl("wait", "--for=condition=Complete", f"job/{job['metadata']['name']}", "--timeout=600s", timeout=620)
        run.kubectl("delete", "pod", run.pods(LONG_STAGE)[0]["metadata"]["name"], "--grace-period=0", "--force")
    finally:
        release.scale(1)
    status = run.until_succeeded()
    assert run.jobs_created() == [
        ("preflight", "preflight"),
        ("stage", LONG_STAGE),
        ("collect", LONG_STAGE),
        ("stage", "sft"),
        ("finalize", "finalize"),
    ]
    assert set(tenant.creates("jobs").values()) == {1}
    entry = stage_status(status, LONG_STAGE)
    assert (entry["attempt"], entry["failures"], entry["cached"]) == (2, 0, False), (
        "the Job that collects is the second"
    )
    metrics = {item["name"]: float(item["value"]) for item in entry["metrics"]}
    assert metrics["steps"] == LONG_STEPS, "the figures are those of the attempt whose message was lost"
    [result] = run.results(LONG_STAGE)
    assert result["manifestDigest"] == entry["output"]["digest"]
    assert_same_end(run, reference, LONG_STAGE, "sft")
