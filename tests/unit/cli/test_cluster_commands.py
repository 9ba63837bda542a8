import builtins
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from support.api_stub import ApiStub, serve
from support.commands import CommandLine
from support.local_runs import pipeline_body

TIME = "2025-01-01T10:00:00Z"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    with serve(tmp_path) as (stub, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.chdir(tmp_path)
        yield stub


@pytest.fixture
def plumbline(monkeypatch, capsys):
    # Read when the client is imported first.
    monkeypatch.setattr("plumbline_cli.commands.wait.POLL_SECONDS", {True: 0.01, False: 0.01})
    return CommandLine(monkeypatch, capsys)


def pipeline(**status: Any) -> dict[str, Any]:
    body = pipeline_body()
    body["metadata"] |= {"namespace": "team-a", "uid": "0b7c", "generation": 3}
    running = {
        "observedGeneration": 3,
        "phase": "Running",
        "runtime": "h100",
        "usage": {"gpuHours": 6.4},
        "stages": [
            {"name": "preflight", "type": "preflight", "phase": "Succeeded", "startTime": TIME, "completionTime": TIME},
            {"name": "sft", "type": "sft", "phase": "Succeeded", "cached": True},
            {
                "name": "dpo",
                "type": "dpo",
                "phase": "Running",
                "job": "demo-dpo-1",
                "startTime": TIME,
                "progress": {"percentage": 38, "message": "step 19/50", "lastUpdateTime": TIME},
                "metrics": [{"name": "loss", "value": "0.52"}],
            },
            {
                "name": "final",
                "type": "merge",
                "phase": "Queued",
                "reason": "WaitingForQuota",
                "message": "position 3 in queue team-a",
            },
        ],
    }
    return {**body, "status": {**running, **status}}


def failed(message: str) -> dict[str, Any]:
    condition = {"type": "Failed", "status": "True", "reason": "BadInput", "lastTransitionTime": TIME}
    return pipeline(phase="Failed", conditions=[{**condition, "message": message}])


def test_status_shows_every_stage_in_plain_words(plumbline, cluster: ApiStub):
    cluster.pipelines["team-a", "demo"] = pipeline()
    ended = plumbline("status", "demo")
    assert ended.code == 0, ended.err
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert lines[0] == "demo · Running · h100 · 6.40 GPU-hours"
    assert "preflight ✔ 0 s" in lines
    assert "sft ✔ found in storage" in lines
    assert any(line.startswith("dpo ━") and "38 % step 19/50" in line for line in lines)
    assert "final ⏸ WaitingForQuota: position 3 in queue team-a" in lines
    assert max(map(len, ended.out.splitlines())) <= 80
    assert json.loads(plumbline("status", "demo", "-o", "json").out)["metadata"]["uid"] == "0b7c"


def test_the_namespace_is_that_of_the_context_unless_one_is_given(plumbline, cluster: ApiStub):
    cluster.pipelines["team-b", "demo"] = pipeline()
    assert plumbline("status", "demo").code == 3
    assert plumbline("status", "demo", "-n", "team-b").code == 0
    assert plumbline("status", "demo", "--context", "other").code == 0
    ended = plumbline("status", "demo", "--context", "none")
    assert ended.code == 3
    assert "context none" in ended.err


def test_what_is_not_there_is_code_3_in_words(plumbline, cluster: ApiStub):
    ended = plumbline("status", "nothing")
    assert ended.code == 3
    assert "there is no AlignmentPipeline nothing in namespace team-a" in ended.err
    cluster.knows_pipelines = False
    assert "does not know AlignmentPipelines; install the Plumbline chart" in plumbline("status", "demo").err
    cluster.failure = (403, {"message": 'user "jane" cannot get resource'})
    ended = plumbline("status", "demo")
    assert ended.code == 3
    assert 'does not allow that: user "jane" cannot get resource' in ended.err


def test_a_cluster_that_does_not_answer_is_code_3(plumbline, cluster: ApiStub, tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    config = (tmp_path / "kubeconfig").read_text().replace(cluster.url, f"http://127.0.0.1:{port}")
    (tmp_path / "dead").write_text(config)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "dead"))
    ended = plumbline("status", "demo")
    assert ended.code == 3
    assert f"the cluster at http://127.0.0.1:{port} cannot be reached" in ended.err
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    ended = plumbline("status", "demo")
    assert ended.code == 3
    assert "no cluster is configured" in ended.err


def test_without_the_client_the_remedy_is_named(plumbline, cluster: ApiStub, monkeypatch):
    real = builtins.__import__

    def without_kubernetes(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("kubernetes"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_kubernetes)
    ended = plumbline("status", "demo")
    assert ended.code == 3
    assert "pip install '.[operator]'" in ended.err


def test_suspend_resume_and_retry_patch_the_spec(plumbline, cluster: ApiStub):
    cluster.pipelines["team-a", "demo"] = pipeline()
    assert "stop after a checkpoint" in plumbline("suspend", "demo").out
    assert cluster.pipelines["team-a", "demo"]["spec"]["suspend"] is True
    assert plumbline("resume", "demo").code == 0
    assert cluster.pipelines["team-a", "demo"]["spec"]["suspend"] is False
    assert plumbline("retry", "demo").code == 0
    first = cluster.pipelines["team-a", "demo"]["spec"]["retry"]
    assert first["stage"] is None, "a merge patch with null takes an earlier stage away"
    assert plumbline("retry", "demo", "dpo").code == 0
    second = cluster.pipelines["team-a", "demo"]["spec"]["retry"]
    assert second["stage"] == "dpo"
    assert second["nonce"] != first["nonce"]
    ended = plumbline("retry", "demo", "dpoo")
    assert ended.code == 2
    assert 'has no stage "dpoo". Stages: preflight, sft, dpo, final, finalize' in ended.err


def test_wait_ends_on_success_on_failure_and_on_time(plumbline, cluster: ApiStub):
    cluster.pipelines["team-a", "demo"] = pipeline(phase="Succeeded")
    ended = plumbline("wait", "demo")
    assert (ended.code, ended.out) == (0, "demo succeeded\n")
    cluster.pipelines["team-a", "demo"] = failed("preflight: prefs.jsonl line 3: no text")
    ended = plumbline("wait", "demo")
    assert ended.code == 1
    assert "preflight: prefs.jsonl line 3: no text" in ended.err
    cluster.pipelines["team-a", "demo"] = pipeline()
    ended = plumbline("wait", "demo", "--timeout", "50ms")
    assert ended.code == 124
    assert "it is Running" in ended.err
    assert plumbline("wait", "demo", "--stage", "sft").code == 0
    assert plumbline("wait", "demo", "--stage", "sfft").code == 2
    assert plumbline("wait", "demo", "--timeout", "soon").code == 2


def test_wait_does_not_believe_the_status_of_an_older_spec(plumbline, cluster: ApiStub):
    cluster.pipelines["team-a", "demo"] = pipeline(phase="Succeeded", observedGeneration=2)
    assert plumbline("wait", "demo", "--timeout", "50ms").code == 124


def test_logs_come_from_the_newest_pod_of_the_stage(plumbline, cluster: ApiStub):
    cluster.pipelines["team-a", "demo"] = pipeline()
    for number, time in ((1, "2025-01-01T10:00:00Z"), (2, "2025-01-01T11:00:00Z")):
        labels = {"plumbline.dev/pipeline-uid": "0b7c", "plumbline.dev/stage": "dpo"}
        annotations = {"plumbline.dev/attempt": str(number)}
        metadata = {"name": f"pod-{number}", "labels": labels, "annotations": annotations, "creationTimestamp": time}
        cluster.pods.append({"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": {"containers": []}})
        cluster.logs[f"pod-{number}"] = f"step {number}\nβ step"
    assert plumbline("logs", "demo").out == "step 2\nβ step\n"
    assert plumbline("logs", "demo", "dpo", "--attempt", "1").out == "step 1\nβ step\n"
    ended = plumbline("logs", "demo", "sft")
    assert ended.code == 3
    assert "found in storage" in ended.err


def test_report_says_where_it_lies(plumbline, cluster: ApiStub):
    uri = "s3://bucket/team-a/pipelines/demo/0b7c/report.html"
    cluster.pipelines["team-a", "demo"] = pipeline(phase="Succeeded", report=uri)
    assert plumbline("report", "demo").out.strip() == uri
    assert json.loads(plumbline("report", "demo", "-o", "json").out) == {"report": uri}
    cluster.pipelines["team-a", "demo"] = pipeline()
    ended = plumbline("report", "demo")
    assert ended.code == 3
    assert "has no report yet: it is Running" in ended.err


def test_report_is_fetched_from_where_the_runtime_keeps_it(plumbline, cluster: ApiStub, tmp_path, monkeypatch):
    asked: list[tuple[str | None, str | None, str, str]] = []

    class Client:
        def __init__(self, endpoint_url: str | None, region_name: str | None) -> None:
            self.where = (endpoint_url, region_name)

        def download_file(self, bucket: str, key: str, path: str) -> None:
            asked.append((*self.where, bucket, key))
            Path(path).write_text("<html>")

    monkeypatch.setattr("boto3.client", lambda _service, **settings: Client(**settings))
    uri = "s3://bucket/team-a/report.html"
    cluster.pipelines["team-a", "demo"] = pipeline(phase="Succeeded", report=uri)
    saved = tmp_path / "r.html"
    assert plumbline("report", "demo", "--save", saved).code == 0, "a runtime that may not be read is no obstacle"
    cluster.runtimes["h100"] = {"spec": {"storage": {"endpoint": "https://s3.example", "region": "eu-west-1"}}}
    assert plumbline("report", "demo", "--save", saved).code == 0
    cluster.pipelines["team-a", "demo"]["spec"]["storage"] = {"uri": "s3://bucket", "endpoint": "https://own.example"}
    assert plumbline("report", "demo", "--save", saved).code == 0
    assert asked == [
        (None, None, "bucket", "team-a/report.html"),
        ("https://s3.example", "eu-west-1", "bucket", "team-a/report.html"),
        ("https://own.example", None, "bucket", "team-a/report.html"),
    ]
    assert saved.read_text() == "<html>"
