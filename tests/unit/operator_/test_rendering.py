"""Rendering: golden manifests, the Pod Security Standard, the schema of Kubernetes, and kubelet's expansion."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from plumbline_api.runtime import AlignmentRuntime
from plumbline_api.stagerun import STAGE_ENV, StageRun
from plumbline_operator.environment import grace_for_trainer
from plumbline_operator.rendering import RenderSettings, render_job, render_service
from plumbline_operator.snapshot import StartStage
from support.planning import World, pipeline_body, runtime_body

GOLDEN = Path(__file__).parent / "golden"
PLAIN = RenderSettings()
SERVED = RenderSettings(
    progress_url="https://plumbline-operator.plumbline-system.svc",
    progress_ca_pem="-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
)
FULL_RUNTIME: dict[str, Any] = {
    "imagePullSecrets": ["registry"],
    "serviceAccountName": "trainer",
    "queueName": "team-queue",
    "caBundleConfigMap": "corporate-ca",
    "proxy": {"httpsProxy": "http://proxy.example:3128", "noProxy": ".svc"},
    "hubEndpoint": "https://hub.example",
    "jobTtl": "1h30m",
    "terminationGracePeriod": "5m",
    "classes": {
        "train": {
            "gpusPerNode": 8,
            "cpu": "64",
            "memory": "512Gi",
            "ephemeralStorage": "200Gi",
            "sharedMemory": "64Gi",
            "nodeSelector": {"pool": "h100"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "priorityClassName": "training",
            "runtimeClassName": "nvidia",
            "env": [{"name": "NCCL_DEBUG", "value": "WARN"}, {"name": "PLUMBLINE_STAGE", "value": "ours"}],
        }
    },
}


def world(stages: list[dict[str, Any]] | None = None, runtime: dict[str, Any] | None = None, **spec: Any) -> World:
    return World(pipeline_body(stages, **spec), runtime=AlignmentRuntime.parse(runtime_body(**(runtime or {}))))


def started(world: World, stage: str) -> StartStage:
    """The start of a stage in a run in which nothing goes wrong."""
    world.settle()
    for name in ["preflight", *(stage.name for stage in world.records[1].stages)]:
        if any(start.run.stage == stage for start in world.starts):
            break
        world.go(name)
    return next(start for start in world.starts if start.run.stage == stage)


def job_of(world: World, stage: str, settings: RenderSettings = PLAIN) -> dict[str, Any]:
    return render_job(started(world, stage), world.records[1], settings)


@cache
def cases() -> dict[str, list[dict[str, Any]]]:
    """Manifests by golden file."""
    one_stage = [{"name": "sft", "sft": {"dataset": "tickets"}, "timeout": "2h"}]
    two_nodes = [{"name": "sft", "sft": {"dataset": "tickets"}, "resources": {"nodes": 2, "gpusPerNode": 4}}]
    bare = world(one_stage, storage={"uri": "s3://bucket/root"})
    full, many = world(one_stage, FULL_RUNTIME), world(two_nodes, FULL_RUNTIME)
    service = render_service(started(many, "sft"))
    assert service is not None
    return {
        "preflight.yaml": [job_of(world(one_stage, {"hubEndpoint": "https://hub.example"}), "preflight", SERVED)],
        "stage-bare.yaml": [job_of(bare, "sft")],
        "stage-full.yaml": [job_of(full, "sft", SERVED)],
        "stage-two-nodes.yaml": [service, job_of(many, "sft", SERVED)],
        "finalize.yaml": [job_of(world(one_stage), "finalize", SERVED)],
    }


@pytest.mark.parametrize("name", sorted(cases()))
def test_manifests_are_the_golden_ones(name: str):
    """Set PLUMBLINE_REGENERATE=1 to write them anew, then review the difference."""
    manifests = cases()[name]
    path = GOLDEN / name
    text = yaml.safe_dump_all(manifests, sort_keys=False, width=120)
    if os.environ.get("PLUMBLINE_REGENERATE"):
        path.write_text(text)
    assert list(yaml.safe_load_all(path.read_text())) == manifests


@pytest.mark.parametrize("name", sorted(cases()))
@pytest.mark.parametrize("version", ["1.31.0", "1.34.0"])
def test_manifests_fit_the_schema_of_kubernetes(name: str, version: str):
    for manifest in cases()[name]:
        kubernetes_validate.validate(manifest, version, strict=True)


RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def violations(pod: dict[str, Any]) -> list[str]:
    """What the restricted Pod Security Standard finds in a pod spec."""
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC", "hostUsers") if name in pod]
    found += [volume["name"] for volume in pod.get("volumes", []) if not (set(volume) - {"name"}) <= RESTRICTED_VOLUMES]
    outer = pod.get("securityContext", {})
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        inner = container.get("securityContext", {})
        seccomp = inner.get("seccompProfile", outer.get("seccompProfile", {})).get("type")
        checks = {
            "privileged": not inner.get("privileged", False),
            "allowPrivilegeEscalation": inner.get("allowPrivilegeEscalation") is False,
            "runAsNonRoot": inner.get("runAsNonRoot", outer.get("runAsNonRoot")) is True,
            "runAsUser": inner.get("runAsUser", outer.get("runAsUser", 1)) != 0,
            "seccompProfile": seccomp in ("RuntimeDefault", "Localhost"),
            "capabilities.drop": inner.get("capabilities", {}).get("drop") == ["ALL"],
            "capabilities.add": not set(inner.get("capabilities", {}).get("add", [])) - {"NET_BIND_SERVICE"},
            "hostPort": not any("hostPort" in port for port in container.get("ports", [])),
        }
        found += [name for name, holds in checks.items() if not holds]
    return found


@pytest.mark.parametrize("name", sorted(cases()))
def test_pods_fit_the_restricted_standard(name: str):
    for manifest in cases()[name]:
        if manifest["kind"] == "Job":
            pod = manifest["spec"]["template"]["spec"]
            assert violations(pod) == []
            assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
            assert pod["automountServiceAccountToken"] is False


def test_the_check_of_the_standard_finds_violations():
    pod = job_of(world(), "preflight")["spec"]["template"]["spec"]
    pod["containers"][0]["securityContext"]["capabilities"]["add"] = ["SYS_ADMIN"]
    pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}})
    assert violations(pod) == ["host", "capabilities.add"]


def kubelet_expands(text: str) -> str:
    """The expansion of kubelet (third_party/forked/golang/expansion) with no variable defined, byte by byte."""
    data, out, index = text.encode(), bytearray(), 0
    while index < len(data):
        if data[index : index + 1] == b"$" and index + 1 < len(data):
            following = data[index + 1 : index + 2]
            if following == b"$":
                out += b"$"
                index += 2
                continue
            if following == b"(":
                end = data.find(b")", index)
                if end != -1:
                    out += data[index : end + 1].replace(b"$(", b"<expanded ").replace(b")", b">")
                    index = end + 1
                    continue
                out += b"$("
            else:
                out += b"$" + chr(following[0]).encode()  # as Go does, a byte becomes a rune
            index += 2
            continue
        out += data[index : index + 1]
        index += 1
    return out.decode()


@pytest.mark.parametrize("pattern", ["$(HOME)", "^cost: $$5", "$é", "a$", "$$(X)", "$("])
def test_the_document_survives_the_expansion_of_variables(pattern: str):
    judge = {"rule": {"matches": "x" + pattern.replace("(", "[(]").replace(")", "[)]")}}
    suites = [{"winRate": {"dataset": "held", "judge": judge}}]
    run = world([{"name": "exam", "evaluate": {"suites": suites}}])
    job = job_of(run, "exam")
    text = next(e["value"] for e in job["spec"]["template"]["spec"]["containers"][0]["env"] if e["name"] == STAGE_ENV)
    assert StageRun.from_json(kubelet_expands(text)) == started(run, "exam").run


def test_only_preflight_may_talk_to_the_hub():
    runtime = {"hubEndpoint": "https://hub.example"}
    names = {}
    for stage in ("preflight", "sft", "finalize"):
        container = job_of(world(runtime=runtime), stage)["spec"]["template"]["spec"]["containers"][0]
        names[stage] = {item["name"]: item.get("value") for item in container["env"]}
    assert names["preflight"]["HF_ENDPOINT"] == "https://hub.example"
    assert "HF_HUB_OFFLINE" not in names["preflight"]
    for stage in ("sft", "finalize"):
        assert names[stage]["HF_HUB_OFFLINE"] == "1"
        assert "HF_ENDPOINT" not in names[stage]


def test_claims_are_mounted_where_their_content_is_read():
    run = world(
        model={"source": "pvc://models/tiny"},
        datasets=[
            {"name": "tickets", "source": "pvc://corpus.v1/tickets.jsonl"},
            {"name": "prefs", "source": "pvc://corpus.v1/prefs.jsonl", "format": "preference"},
            {"name": "held", "source": "s3://corpus/held.jsonl", "role": "test"},
        ],
    )
    mounted = {}
    for stage in ("preflight", "sft", "final", "finalize"):
        container = job_of(run, stage)["spec"]["template"]["spec"]["containers"][0]
        paths = (mount["mountPath"] for mount in container["volumeMounts"])
        mounted[stage] = [path for path in paths if path.startswith("/mnt/claims")]
    assert mounted["preflight"] == mounted["sft"] == ["/mnt/claims/models", "/mnt/claims/corpus.v1"]
    assert mounted["final"] == ["/mnt/claims/models"]
    assert mounted["finalize"] == []


def test_an_edited_runtime_does_not_change_what_is_rendered():
    run = world()
    before = job_of(run, "sft")
    run.runtime = AlignmentRuntime.parse(runtime_body(image="registry.example/other:1"))
    assert render_job(started(run, "sft"), run.records[1], PLAIN) == before


def test_a_job_fits_the_limits_on_names_and_labels():
    run = world([{"name": "s" * 30, "sft": {"dataset": "tickets"}}])
    run.body["metadata"]["name"] = "p" * 40
    job = job_of(run, "s" * 30)
    assert len(job["metadata"]["name"]) <= 52
    labels = job["metadata"]["labels"] | job["spec"]["template"]["metadata"]["labels"]
    assert all(len(value) <= 63 for value in labels.values())
    assert len(json.dumps(job)) < 256 * 1024


@pytest.mark.parametrize(("seconds", "left"), [(120, 108), (30, 25), (6, 1), (3, 1)])
def test_the_trainer_gets_a_little_less_than_the_grace_period(seconds: float, left: int):
    assert grace_for_trainer(seconds) == left


def test_a_stage_gets_the_tokens_of_the_endpoints_it_asks_and_no_other():
    endpoints = [
        {"name": "help-ful", "url": "https://judge.example/a", "secretName": "judge"},
        {"name": "open", "url": "https://judge.example/b"},
        {"name": "unused", "url": "https://judge.example/c", "secretName": "other"},
    ]
    rewards = [{"endpoint": "help-ful"}, {"endpoint": "open"}]
    stages = [{"name": "rl", "grpo": {"prompts": "tickets", "rewards": rewards}}]
    made = world(stages, {"rewardEndpoints": endpoints})

    def secrets_of(stage: str) -> dict[str, Any]:
        container = job_of(made, stage)["spec"]["template"]["spec"]["containers"][0]
        return {item["name"]: item["valueFrom"]["secretKeyRef"] for item in container["env"] if "valueFrom" in item}

    tokens = {name: found for name, found in secrets_of("rl").items() if not name.startswith("AWS_")}
    assert tokens == {"PLUMBLINE_ENDPOINT_TOKEN_HELP_FUL": {"name": "judge", "key": "token"}}
    # preflight asks each of them once.
    asked = {name: found for name, found in secrets_of("preflight").items() if not name.startswith("AWS_")}
    assert asked == tokens
    run = started(made, "rl").run
    assert [endpoint.name for endpoint in run.endpoints or []] == ["help-ful", "open"]
