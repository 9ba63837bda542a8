"""Bad input is named with its remedy, costs no training, and reads the same in the status and on the command line."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from cluster.lifecycle import environment
from support.tenant import Run, Tenant, condition, stage_status
from support.tinypipeline import Manifest, stage_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]


def short(tenant: Tenant, name: str) -> Manifest:
    """One stage of a few steps."""
    return tenant.manifest(name, stages=("sft",))


def plumbline(tenant: Tenant, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "plumbline_cli.main", *arguments, "-n", tenant.namespace],
        env=environment(tenant.cluster.state) | {"COLUMNS": "2000", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def with_bad_row(tenant: Tenant) -> Manifest:
    manifest = short(tenant, "bad-row")
    lines = tenant.read(f"{tenant.prefix}/data/questions.jsonl").decode().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "output": 3})
    tenant.put(f"{tenant.prefix}/data/bad.jsonl", "\n".join(lines).encode())
    manifest["spec"]["datasets"][0]["source"] = f"{tenant.prefix}/data/bad.jsonl"
    return manifest


def with_unreadable_file(tenant: Tenant) -> Manifest:
    manifest = short(tenant, "unreadable")
    tenant.put(f"{tenant.prefix}/data/unreadable.jsonl", b'{"instruction": "a", "output": "b"}\nnot JSON at all\n')
    manifest["spec"]["datasets"][0]["source"] = f"{tenant.prefix}/data/unreadable.jsonl"
    return manifest


def with_missing_column(tenant: Tenant) -> Manifest:
    manifest = short(tenant, "column")
    manifest["spec"]["datasets"][0]["columns"] = {"output": "answer"}
    return manifest


def with_no_such_data(tenant: Tenant) -> Manifest:
    manifest = short(tenant, "no-data")
    manifest["spec"]["datasets"][0]["source"] = f"{tenant.prefix}/data/nowhere.jsonl"
    return manifest


def with_no_such_model(tenant: Tenant) -> Manifest:
    manifest = short(tenant, "no-model")
    manifest["spec"]["model"]["source"] = f"{tenant.prefix}/nowhere"
    return manifest


def with_wrong_key(tenant: Tenant) -> Manifest:
    manifest = short(tenant, "wrong-key")
    tenant.create_secret("wrong", AWS_SECRET_ACCESS_KEY="0" * 40)
    manifest["spec"]["storage"]["secretName"] = "wrong"
    return manifest


def with_empty_split(tenant: Tenant) -> Manifest:
    manifest = tenant.manifest("empty", stages=("sft", "exam"))
    manifest["spec"]["datasets"][0]["split"] = {"test": 0.0001}
    stage_of(manifest, "exam")["evaluate"]["suites"] = [{"perplexity": {"dataset": "questions"}}]
    manifest["spec"]["datasets"] = manifest["spec"]["datasets"][:1]
    return manifest


def with_wrong_format(tenant: Tenant) -> Manifest:
    manifest = short(tenant, "format")
    manifest["spec"]["datasets"][0] |= {"source": f"{tenant.prefix}/data/preferences.jsonl", "format": "auto"}
    stage = stage_of(manifest, "sft")
    stage["pretrain"] = stage.pop("sft")
    return manifest


CASES: dict[Callable[[Tenant], Manifest], tuple[str, ...]] = {
    with_bad_row: ("bad.jsonl", "line 3", "output"),
    with_unreadable_file: ("unreadable.jsonl", "line 2"),
    with_missing_column: ("questions.jsonl", "answer"),
    with_no_such_data: ("nowhere.jsonl",),
    with_no_such_model: ("nowhere",),
    with_wrong_key: ("refused", "AWS_SECRET_ACCESS_KEY", "storage.secretName"),
    with_empty_split: ("questions", "test split"),
    with_wrong_format: ("questions", "pretrain"),
}
"""What the message has to name."""


def test_what_preflight_finds_fails_the_run_before_anything_trains(tenant: Tenant) -> None:
    runs = {case: tenant.run(case(tenant)) for case in CASES}
    found: list[str] = []
    for case, words in CASES.items():
        run = runs[case]
        status = run.until_failed()
        entry = stage_status(status, "preflight")
        message = entry["message"]
        found.append(f"{case.__name__}: {entry['reason']}: {message}")
        assert (entry["phase"], entry["attempt"]) == ("Failed", 1), "bad input is never retried"
        assert all(word in message for word in words), f"{case.__name__}: {message}"
        assert not [name for role, name in run.jobs_created() if role == "stage"]
        assert condition(status, "Failed")["message"] == f"preflight: {entry['reason']}: {message}"
        assert "Traceback" not in json.dumps(status)
        shown = plumbline(tenant, "status", run.name)
        assert message in " ".join(shown.stdout.split()), shown.stdout
        waited = plumbline(tenant, "wait", run.name)
        assert waited.returncode == 1
        assert message in " ".join(waited.stderr.split()), waited.stderr
    print("\n".join(found))


def test_a_missing_secret_is_why_it_waits_and_it_starts_once_the_secret_is_there(tenant: Tenant) -> None:
    manifest = short(tenant, "waits")
    manifest["spec"]["storage"]["secretName"] = "not-yet"
    run = tenant.run(manifest)
    status = run.until(
        "it says why it waits",
        lambda status: status if stage_status(status, "preflight").get("message") else None,
    )
    entry = stage_status(status, "preflight")
    assert (entry["phase"], entry["reason"]) == ("Queued", "CreateContainerConfigError")
    assert 'secret "not-yet" not found' in entry["message"]
    assert "create it in the pipeline's namespace" in entry["message"]
    assert entry["message"] in " ".join(plumbline(tenant, "status", "waits").stdout.split())
    tenant.create_secret("not-yet")
    run.until_succeeded()
    assert set(tenant.creates("jobs").values()) == {1}


def broken(tenant: Tenant, change: Callable[[dict[str, Any]], object]) -> Manifest:
    manifest = tenant.manifest("broken", stages=("sft", "dpo"))
    change(manifest["spec"])
    return manifest


def test_what_the_api_server_can_see_it_refuses(tenant: Tenant) -> None:
    cases: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (lambda spec: spec["stages"].append(spec["stages"][0]), "Duplicate value"),
        (lambda spec: spec["stages"][0].update(merge={}), "exactly one stage type"),
        (lambda spec: spec["stages"][1]["dpo"].update(beta=-1), "spec.stages[1].dpo.beta"),
        (lambda spec: spec["stages"][1]["dpo"].update(betta=1), 'unknown field "spec.stages[1].dpo.betta"'),
        (lambda spec: spec["stages"][0].update(name="x" * 31), "spec.stages[0].name"),
    ]
    for change, words in cases:
        manifest = broken(tenant, change)
        said = tenant.cluster.kubectl(
            "apply", "-n", tenant.namespace, "-f", "-", stdin=json.dumps(manifest), check=False
        )
        assert words in said, said
    long = tenant.manifest("x" * 41, stages=("sft",))
    run_of(tenant, long, "metadata.name")


def run_of(tenant: Tenant, manifest: Manifest, path: str) -> str:
    """Apply what the API server takes, or refuses in words that hold `path`; the message that then names it."""
    said = tenant.cluster.kubectl("apply", "-n", tenant.namespace, "-f", "-", stdin=json.dumps(manifest), check=False)
    if "created" not in said and "configured" not in said:
        assert path in said, said
        return said
    run = Run(tenant, manifest["metadata"]["name"])
    status = run.until(
        "it is refused", lambda status: status if status.get("phase") == "Refused" else None, ended=False
    )
    found = condition(status, "Accepted")
    assert found["status"] == "False"
    assert condition(status, "Stalled")["status"] == "True"
    assert path in found["message"], found["message"]
    shown = plumbline(tenant, "status", run.name).stdout
    assert " ".join(found["message"].split()) in " ".join(shown.split())
    assert run.jobs_created() == []
    return str(found["message"])


def test_what_only_the_checker_can_see_is_refused_with_path_and_remedy(tenant: Tenant) -> None:
    cycle = tenant.manifest("cycle", stages=("sft", "dpo"))
    cycle["spec"]["stages"][0]["after"] = ["dpo"]
    run_of(tenant, cycle, "spec.stages")
    splitless = tenant.manifest("splitless", stages=("exam",))
    splitless["spec"]["datasets"][0].pop("split")
    assert "such as 0.1" in run_of(tenant, splitless, "spec.stages[0].evaluate.suites[0].perplexity.dataset")
    unfit = tenant.manifest("unfit", stages=("dpo",))
    unfit["spec"]["datasets"][0]["format"] = "text"
    assert "preference" in run_of(tenant, unfit, "spec.stages[0].dpo.dataset")
    unknown = tenant.manifest("unknown", stages=("sft",))
    unknown["spec"]["stages"][0]["sft"]["dataset"] = "question"
    assert "questions" in run_of(tenant, unknown, "spec.stages[0].sft.dataset"), "the name that was meant is offered"
