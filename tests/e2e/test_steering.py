"""What a user does to a run while it goes on: suspend, resume, edit, retry, delete."""

import time

import pytest
from support.audit import read_audit_log
from support.reference import Reference, weights_of
from support.tenant import Run, Tenant, condition, stage_status
from support.tinypipeline import LONG_STAGE, LONG_STEPS, stage_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]


def train(run: Run) -> None:
    """Wait until the long stage has saved some of its work."""
    run.until("a checkpoint is committed", lambda _: run.checkpoints(LONG_STAGE))


def test_suspend_stops_after_a_checkpoint_and_resume_goes_on(tenant: Tenant, reference: Reference) -> None:
    run = tenant.run(tenant.manifest("tiny", stages=(LONG_STAGE,)))
    train(run)
    run.patch(suspend=True)
    status = run.until("it is suspended", lambda status: status if status.get("phase") == "Suspended" else None)
    assert condition(status, "Suspended")["status"] == "True"
    assert condition(status, "Running")["status"] == "False"
    assert stage_status(status, LONG_STAGE)["phase"] == "Suspended"
    run.until("its pod is gone", lambda _: not [p for p in run.pods(LONG_STAGE) if p["status"]["phase"] == "Running"])
    [stopped] = run.results(LONG_STAGE)
    assert stopped["outcome"] == "Stopped"
    saved = run.checkpoints(LONG_STAGE)[-1]
    assert 0 < saved < LONG_STEPS
    assert stopped["lastStep"] == saved, "the checkpoint is of the last step"

    run.patch(suspend=False)
    status = run.until_succeeded()
    entry = stage_status(status, LONG_STAGE)
    assert (entry["attempt"], entry["failures"]) == (1, 0)
    last = run.results(LONG_STAGE)[-1]
    assert (last["outcome"], last["firstStep"], last["lastStep"]) == ("Succeeded", saved, LONG_STEPS)
    assert weights_of(run.output(LONG_STAGE)) == weights_of(reference.output(LONG_STAGE))
    assert set(tenant.creates("jobs").values()) == {1}


def test_deletion_while_a_stage_trains_leaves_nothing(tenant: Tenant) -> None:
    run = tenant.run(tenant.manifest("tiny", stages=(LONG_STAGE,)))
    train(run)
    kinds = "alp,jobs,pods,controllerrevisions,services,configmaps,persistentvolumeclaims,leases"
    before = set(run.kubectl("get", kinds, "-o", "name").split())
    assert any(name.startswith("controllerrevision") for name in before)
    run.kubectl("delete", "alp", "tiny", timeout=300)
    deadline = time.monotonic() + 300
    while left := set(run.kubectl("get", kinds, "-o", "name").split()) - {"configmap/kube-root-ca.crt"}:
        assert time.monotonic() < deadline, f"still there: {left}"
    # Nothing is made anew by an operator that has not noticed.
    writes = [
        event
        for event in read_audit_log(tenant.cluster.audit_log, tenant.namespace)
        if event.verb == "create" and event.resource == "jobs"
    ]
    assert len(writes) == 2, [event.name for event in writes]


def test_an_edit_runs_again_only_what_it_changes(tenant: Tenant, reference: Reference) -> None:
    manifest = tenant.manifest("tiny", stages=(LONG_STAGE, "sft", "dpo"))
    run = tenant.run(manifest)
    train(run)
    [job] = run.jobs()
    stage_of(manifest, "sft")["sft"]["training"]["learningRate"] = 5.0e-4
    tenant.run(manifest)
    run.until("the new spec is seen", lambda status: status.get("observedGeneration") == 2)
    status = run.until_succeeded()
    assert stage_status(status, LONG_STAGE)["job"] == job["metadata"]["name"]
    assert [name for role, name in run.jobs_created() if role == "stage"] == [LONG_STAGE, "sft", "dpo"]
    assert weights_of(run.output(LONG_STAGE)) == weights_of(reference.output(LONG_STAGE))
    assert stage_status(status, "sft")["fingerprint"] != reference.fingerprint("sft")
    sft = stage_status(status, "sft")

    stage_of(manifest, "dpo")["dpo"]["beta"] = 0.5
    tenant.run(manifest)
    run.until("the third spec is seen", lambda status: status.get("observedGeneration") == 3, ended=False)
    status = run.until(
        "it succeeds again",
        lambda status: status if condition(status, "Succeeded").get("observedGeneration") == 3
        and condition(status, "Succeeded")["status"] == "True" else None,
        ended=False,
    )  # fmt: skip
    assert [name for role, name in run.jobs_created() if role == "stage"] == [LONG_STAGE, "sft", "dpo", "dpo"]
    assert stage_status(status, "sft")["fingerprint"] == sft["fingerprint"]
    assert stage_status(status, "sft")["output"]["uri"] == sft["output"]["uri"]
    assert set(tenant.creates("jobs").values()) == {1}


def test_a_failed_stage_tells_its_reason_and_is_retried_once_it_is_mended(tenant: Tenant, reference: Reference) -> None:
    """The data of the second stage change after preflight has pinned them, which no computation may hide."""
    run = tenant.run(tenant.manifest("tiny", stages=(LONG_STAGE, "sft")))
    run.until(
        "preflight is over", lambda status: stage_status(status, LONG_STAGE).get("phase") in ("Queued", "Running")
    )
    uri = f"{tenant.prefix}/data/questions.jsonl"
    whole = tenant.read(uri)
    tenant.put(uri, whole.replace(b"\n", b" \n", 1))
    status = run.until_failed()
    entry = stage_status(status, "sft")
    assert (entry["phase"], entry["reason"], entry["attempt"]) == ("Failed", "InputChanged", 1)
    assert "questions.jsonl" in entry["message"]
    [result] = run.results("sft")
    assert entry["message"] == result["message"], "the status has the trainer's own words"
    assert condition(status, "Failed")["message"] == f"sft: InputChanged: {result['message']}"
    assert stage_status(status, LONG_STAGE)["phase"] == "Succeeded"
    assert stage_status(status, "finalize")["phase"] == "Succeeded", "a failed run is reported, too"

    tenant.put(uri, whole)
    run.patch(retry={"stage": "sft", "nonce": "mended"})
    status = run.until(
        "it succeeds",
        lambda status: status if condition(status, "Succeeded").get("status") == "True" else None,
        ended=False,
    )
    assert status["retryNonce"] == "mended"
    assert [name for role, name in run.jobs_created() if role == "stage"] == [LONG_STAGE, "sft", "sft"]
    assert weights_of(run.output("sft")) == weights_of(reference.output("sft"))
    assert set(tenant.creates("jobs").values()) == {1}
