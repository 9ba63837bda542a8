"""The whole product on the real node: Helm, kubectl, S3, every stage type; the same bits as on this machine."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster.lifecycle import environment
from support.reference import Reference, files_of, weights_of
from support.release import NAME, NAMESPACE, Release
from support.tenant import Run, Tenant, condition, fresh_tenant, stage_status
from support.tinypipeline import LONG_STAGE, LONG_STEPS, STAGE_NAMES
from support.watching import Film, filmed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

ALL = ("preflight", *STAGE_NAMES, "finalize")
TYPES = {"domain": "pretrain", "sft": "sft", "dpo": "dpo", "final": "merge", "exam": "evaluate"}


@dataclass(frozen=True)
class Finished:
    """A run that went through undisturbed, and what was seen of it."""

    tenant: Tenant
    run: Run
    film: Film


@pytest.fixture(scope="module")
def finished(release: Release, tiny_inputs: Path, reference: Reference) -> Iterator[Finished]:
    """The tiny pipeline, applied and waited for as a user does; the same runs on this machine beside it."""
    with fresh_tenant(release, tiny_inputs, "whole") as tenant:
        run = tenant.run(tenant.manifest("tiny"))
        with filmed(run) as film:
            run.until("it is accepted", lambda status: condition(status, "Accepted").get("status") == "True")
            run.until_succeeded()
            waited = run.kubectl("wait", "--for=condition=Succeeded", f"alp/{run.name}", "--timeout=10s")
            assert "condition met" in waited
        yield Finished(tenant, run, film)


def plumbline(tenant: Tenant, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, on the cluster and in the tenant's namespace."""
    return subprocess.run(
        [sys.executable, "-m", "plumbline_cli.main", *arguments, "-n", tenant.namespace],
        env=environment(tenant.cluster.state) | {"COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_status_tells_of_every_stage(finished: Finished) -> None:
    status = finished.run.status
    assert {item["type"]: item["status"] for item in status["conditions"]} == {
        "Accepted": "True",
        "Running": "False",
        "Suspended": "False",
        "Reported": "True",
        "Succeeded": "True",
        "Failed": "False",
        "Ready": "True",
        "Reconciling": "False",
        "Stalled": "False",
    }
    assert all(item["observedGeneration"] == 1 for item in status["conditions"])
    assert [entry["name"] for entry in status["stages"]] == list(ALL)
    for entry in status["stages"]:
        assert (entry["phase"], entry["attempt"], entry["failures"], entry["cached"]) == ("Succeeded", 1, 0, False)
        assert entry["startTime"] <= entry["completionTime"]
    for name, type_ in TYPES.items():
        entry = stage_status(status, name)
        assert entry["type"] == type_
        assert entry["output"]["uri"] == finished.run.stage_root(name)
        assert re.fullmatch("[0-9a-f]{64}", entry["output"]["digest"])
        assert 0 < len(entry["metrics"]) <= 20
    metrics = {item["name"]: float(item["value"]) for item in stage_status(status, LONG_STAGE)["metrics"]}
    assert metrics["steps"] == LONG_STEPS
    assert metrics["tokens"] > 1000
    exam = {item["name"]: float(item["value"]) for item in stage_status(status, "exam")["metrics"]}
    assert exam["perplexity"] < exam["perplexity.baseline"]
    assert exam["winRate.lower"] <= exam["winRate"] <= exam["winRate.upper"]
    assert status["model"]["stage"] == "final"
    assert status["model"]["uri"] == finished.run.stage_root("final")
    assert [item["name"] for item in status["inputs"]] == [
        "model",
        "dataset/notes",
        "dataset/questions",
        "dataset/preferences",
    ]


def test_weights_are_the_bits_of_a_local_run(finished: Finished, reference: Reference) -> None:
    for name in STAGE_NAMES:
        assert stage_status(finished.run.status, name)["fingerprint"] == reference.fingerprint(name)
    for name in ("domain", "sft", "dpo", "final"):
        assert weights_of(finished.run.output(name)) == weights_of(reference.output(name)), name
    merged = files_of(finished.run.output("final"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(merged)


def test_stages_are_seen_to_advance(finished: Finished) -> None:
    film = finished.film
    for name in ALL:
        phases = film.phases(name)
        assert phases[-2:] == ["Running", "Succeeded"], f"{name}: {phases}"
    seen = film.progress(LONG_STAGE)
    assert seen, "no progress of the running stage was shown"
    told = [item["message"] for item in seen]
    assert all(told)
    # Before its first step a stage says what it does instead, such as comparing its two paths.
    assert any(re.match(rf"step \d+/{LONG_STEPS}", text) for text in told), told
    percentages = [item["percentage"] for item in seen]
    assert percentages == sorted(percentages)
    assert "progress" not in stage_status(finished.run.status, LONG_STAGE)
    order = [phase for phase, _ in _grouped(status.get("phase") for status in film.statuses) if phase is not None]
    assert order[-3:] == ["Preflight", "Running", "Succeeded"]
    columns = {status.get("stage") for status in film.statuses}
    assert {f"{name} ({index + 1}/5)" for index, name in enumerate(STAGE_NAMES)} <= columns


def _grouped(items: Iterator[str | None]) -> list[tuple[str | None, int]]:
    groups: list[tuple[str | None, int]] = []
    for item in items:
        if groups and groups[-1][0] == item:
            groups[-1] = (item, groups[-1][1] + 1)
        else:
            groups.append((item, 1))
    return groups


def test_every_job_was_created_once_and_ran_one_trainer(finished: Finished) -> None:
    created = finished.run.jobs_created()
    assert [name for _, name in created] == list(ALL)
    assert set(finished.tenant.creates("jobs").values()) == {1}
    assert sum(finished.tenant.creates("pods").values()) == len(ALL)
    for name in STAGE_NAMES:
        [result] = finished.run.results(name)
        assert result["outcome"] == "Succeeded"
        assert not result["reused"]


def test_columns_and_events_for_people(finished: Finished) -> None:
    header, row = finished.run.kubectl("get", "alp").splitlines()
    assert header.split() == ["NAME", "PHASE", "STAGE", "PROGRESS", "GPU-HOURS", "AGE"]
    assert row.split()[:3] == ["tiny", "Succeeded", "5/5"]
    events = finished.tenant.cluster.get(
        "events", "-n", finished.tenant.namespace, "--field-selector=involvedObject.name=tiny"
    )["items"]
    assert {item["type"] for item in events} == {"Normal"}
    told = [(item["reason"], item["message"]) for item in events]
    assert {"Accepted", "Succeeded"} <= {reason for reason, _ in told}
    for reason in ("StageStarted", "StageSucceeded"):
        assert sorted(text.split(":")[0] for found, text in told if found == reason) == sorted(ALL)


def test_report_lineage_and_card_lie_in_storage(finished: Finished) -> None:
    files = finished.run.report_files()
    assert {"plan.json", "lineage.json", "report.html", "model-card.md"} <= set(files)
    assert finished.run.status["report"] == files["report.html"]
    page = finished.tenant.read(files["report.html"]).decode()
    assert page.lstrip().lower().startswith("<!doctype html")
    assert not re.search(r'(src|href)="https?://', page), "the report is one file that loads nothing"
    for name in STAGE_NAMES:
        assert name in page
    lineage = finished.tenant.read(files["lineage.json"]).decode()
    digests = [stage_status(finished.run.status, name)["output"]["digest"] for name in STAGE_NAMES]
    for digest in [*digests, *(item["digest"] for item in finished.run.status["inputs"])]:
        assert digest in lineage
    card = finished.tenant.read(files["model-card.md"]).decode()
    assert "perplexity" in card.lower()


def test_no_secret_is_told_anywhere(finished: Finished) -> None:
    secret = finished.tenant.cluster.object_store.secret_key
    texts = [
        json.dumps(finished.run.body),
        finished.run.kubectl("get", "jobs,pods,events,controllerrevisions", "-o", "json"),
        finished.tenant.release.logs(1000),
        *(finished.tenant.read(uri).decode(errors="replace") for uri in finished.run.report_files().values()),
    ]
    assert not any(secret in text for text in texts)


def test_the_command_shows_what_the_cluster_knows(finished: Finished) -> None:
    shown = plumbline(finished.tenant, "status", "tiny")
    assert shown.returncode == 0, shown.stderr
    for name in STAGE_NAMES:
        assert name in shown.stdout
    assert finished.run.status["report"] in shown.stdout
    as_json = plumbline(finished.tenant, "status", "tiny", "-o", "json")
    assert json.loads(as_json.stdout)["status"]["phase"] == "Succeeded"
    waited = plumbline(finished.tenant, "wait", "tiny")
    assert waited.returncode == 0, waited.stderr
    assert "tiny succeeded" in waited.stdout
    log = plumbline(finished.tenant, "logs", "tiny", LONG_STAGE)
    assert log.returncode == 0, log.stderr
    assert f"step {LONG_STEPS}/{LONG_STEPS}" in log.stdout


def test_explain_reads_well(finished: Finished) -> None:
    text = finished.run.kubectl("explain", "alp.spec.stages.dpo")
    assert "Direct preference optimisation" in text
    assert re.search(r"beta\t<number>", text)
    assert "Strength of the pull towards the reference" in text


def test_helm_test_passes(finished: Finished) -> None:
    cluster = finished.tenant.cluster
    said = cluster.helm("test", NAME, "--namespace", NAMESPACE, "--logs", "--timeout", "5m")
    assert re.search(r"Phase:\s+Succeeded", said)


def test_the_same_again_trains_nothing_and_a_flipped_byte_is_computed_anew(finished: Finished) -> None:
    tenant = finished.tenant
    before = {name: finished.run.output(name) for name in STAGE_NAMES}
    again = tenant.run(tenant.manifest("again"))
    status = again.until_succeeded()
    assert all(stage_status(status, name)["cached"] for name in STAGE_NAMES), again.explain()
    assert [role for role, _ in again.jobs_created()] == ["preflight", "finalize"]
    assert not any(again.results(name) for name in STAGE_NAMES), "a trainer was started"

    weights = _file_of(finished, "final", "model.safetensors")
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    mended = tenant.run(tenant.manifest("mended"))
    status = mended.until_succeeded()
    assert {name: stage_status(status, name)["cached"] for name in STAGE_NAMES} == {
        "domain": True,
        "sft": True,
        "dpo": True,
        "final": False,
        "exam": False,
    }
    assert [name for role, name in mended.jobs_created() if role == "stage"] == ["final", "exam"]
    assert files_of(mended.output("final")) == files_of(before["final"]), "the same bits as before the damage"
    [result] = mended.results("final")
    assert result["outcome"] == "Succeeded"
    assert not result["reused"]


def _file_of(finished: Finished, stage: str, path: str) -> Path:
    """A file of an output below the S3 server's folder: what a failing disk would damage, unseen by the server."""
    store, output = finished.tenant.cluster.object_store, finished.run.output(stage)
    key = f"{finished.run.stage_root(stage)}/{output['folder']}/{path}".removeprefix("s3://")
    found = Path(store.folder) / key
    assert found.is_file()
    return found
