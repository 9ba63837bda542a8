"""What the chart renders: rights, pod security, CRDs, values that are refused. Needs Helm, which is built from Go modules where it is not installed."""

import json
import shutil
import subprocess
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from cluster.binaries import find_program
from cluster.errors import ClusterUnavailableError
from plumbline_api.runtime import AlignmentRuntime
from plumbline_operator.configuration import OperatorSettings
from plumbline_operator.rbac import RULES
from support.podsecurity import find_violations

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "plumbline"
RBAC_GOLDEN = Path(__file__).with_name("rbac.golden.yaml")
KUBERNETES = "1.34.0"
EVERYTHING = (
    "podDisruptionBudget.enabled=true",
    "metrics.serviceMonitor.enabled=true",
    "metrics.prometheusRule.enabled=true",
)
Objects = list[dict[str, Any]]


@pytest.fixture(scope="session")
def helm() -> str:
    try:
        return shutil.which("helm") or str(find_program("helm"))
    except ClusterUnavailableError as error:
        pytest.skip(f"Helm is neither on PATH nor can it be built: {error}; or install Helm 3")


def run_helm(helm: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm, *arguments], capture_output=True, text=True, timeout=60)


@cache
def rendered(helm: str, values: tuple[str, ...], arguments: tuple[str, ...]) -> str:
    sets = [word for value in values for word in ("--set", value)]
    command = ["template", "here", str(CHART), "--namespace", "system", "--kube-version", KUBERNETES, *sets, *arguments]
    done = run_helm(helm, *command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(helm: str, *values: str, arguments: tuple[str, ...] = ()) -> Objects:
    """Every object of the chart, hooks and tests included."""
    documents = yaml.load_all(rendered(helm, values, arguments), Loader=yaml.CSafeLoader)
    return [document for document in documents if document]


def refusal(helm: str, *values: str) -> str:
    """What Helm says to values that it refuses."""
    sets = [word for value in values for word in ("--set", value)]
    done = run_helm(helm, "template", "here", str(CHART), "--kube-version", KUBERNETES, *sets)
    assert done.returncode != 0, f"{values} were accepted"
    return done.stderr


def of_kind(objects: Objects, kind: str) -> Objects:
    return [item for item in objects if item["kind"] == kind]


def one(objects: Objects, kind: str, name: str = "") -> dict[str, Any]:
    found = [item for item in of_kind(objects, kind) if name in item["metadata"]["name"]]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]


def default_runtime(objects: Objects) -> dict[str, Any]:
    """The runtime that the hook's job applies."""
    (container,) = one(objects, "Job")["spec"]["template"]["spec"]["containers"]
    runtime: dict[str, Any] = json.loads(next(item["value"] for item in container["env"] if item["name"] == "RUNTIME"))
    return runtime


def pod_specs(objects: Objects) -> dict[str, dict[str, Any]]:
    """The pod spec of everything that makes a pod."""
    specs = {}
    for item in objects:
        spec = item.get("spec", {})
        if item["kind"] == "Pod":
            specs[item["metadata"]["name"]] = spec
        elif "template" in spec:
            specs[item["metadata"]["name"]] = spec["template"]["spec"]
    return specs


def test_operator_has_exactly_the_rights_of_the_golden_file(helm: str) -> None:
    roles = {item["metadata"]["name"]: item["rules"] for item in of_kind(render(helm), "ClusterRole")}
    golden = yaml.safe_load(RBAC_GOLDEN.read_text())
    assert roles == golden, "the rights changed: if that is meant, review the difference and edit rbac.golden.yaml"


def test_operator_has_the_rights_that_its_code_names(helm: str) -> None:
    roles = {item["metadata"]["name"]: item["rules"] for item in of_kind(render(helm), "ClusterRole")}
    granted = [(tuple(r["apiGroups"]), tuple(r["resources"]), tuple(r["verbs"])) for r in roles["here-plumbline"]]
    assert granted == [tuple(rule) for rule in RULES]


def test_no_right_is_a_wildcard_and_no_secret_is_readable(helm: str) -> None:
    objects = render(helm)
    forbidden_resources = {
        "secrets",
        "pods/exec",
        "pods/attach",
        "pods/portforward",
        "pods/proxy",
        "nodes/proxy",
        "serviceaccounts/token",
    }
    forbidden_verbs = {"escalate", "bind", "impersonate"}
    rules = [rule for item in of_kind(objects, "ClusterRole") + of_kind(objects, "Role") for rule in item["rules"]]
    assert rules
    for rule in rules:
        words = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert not any("*" in word for word in words), rule
        assert not forbidden_resources & set(rule["resources"]), rule
        assert not forbidden_verbs & set(rule["verbs"]), rule


def test_tenants_cannot_write_what_belongs_to_the_operator_or_the_platform(helm: str) -> None:
    writes = {"create", "update", "patch", "delete", "deletecollection"}
    for item in of_kind(render(helm), "ClusterRole"):
        if any("aggregate-to" in label for label in item["metadata"]["labels"]):
            written = {
                resource for rule in item["rules"] if writes & set(rule["verbs"]) for resource in rule["resources"]
            }
            assert written <= {"alignmentpipelines"}


def test_every_pod_passes_the_restricted_standard(helm: str) -> None:
    specs = pod_specs(render(helm, *EVERYTHING))
    assert set(specs) == {"here-plumbline", "here-plumbline-test", "here-plumbline-runtime"}
    assert {name: find_violations(spec) for name, spec in specs.items()} == {name: [] for name in specs}


def test_every_container_has_a_read_only_root_and_a_writable_tmp_and_limits(helm: str) -> None:
    for name, spec in pod_specs(render(helm)).items():
        volumes = {volume["name"] for volume in spec["volumes"] if "emptyDir" in volume}
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
            assert next(mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/tmp") in volumes
            assert "memory" in container["resources"]["limits"], name


def test_pod_security_check_finds_what_the_standard_forbids() -> None:
    pod = {
        "hostNetwork": True,
        "volumes": [{"name": "disk", "hostPath": {"path": "/"}}],
        "containers": [
            {
                "name": "main",
                "ports": [{"hostPort": 80}],
                "securityContext": {"privileged": True, "capabilities": {"add": ["SYS_ADMIN"]}},
                "livenessProbe": {"httpGet": {"host": "169.254.169.254"}},
            }
        ],
    }
    assert len(find_violations(pod)) == 10


def test_service_offers_every_port_that_the_test_pod_asks(helm: str) -> None:
    objects = render(helm)
    ports = {port["port"]: port["targetPort"] for port in one(objects, "Service")["spec"]["ports"]}
    container = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert set(ports.values()) == {port["name"] for port in container["ports"]}
    for variable in one(objects, "Pod")["spec"]["containers"][0]["env"]:
        address = urlsplit(variable["value"])
        assert address.hostname == "here-plumbline.system.svc"
        assert (address.port or 443) in ports


def test_operator_knows_every_variable_that_the_chart_sets(helm: str) -> None:
    container = one(render(helm, "operator.progressTlsSecretName=tls"), "Deployment")["spec"]["template"]["spec"][
        "containers"
    ][0]
    given = {item["name"]: item.get("value", "from-the-pod") for item in container["env"]}
    known = {f"PLUMBLINE_{field.name.upper()}" for field in fields(OperatorSettings)}
    assert set(given) <= known
    settings = OperatorSettings.from_environment(given)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        "progress": settings.progress_port,
        "metrics": settings.metrics_port,
        "health": settings.health_port,
    }
    assert settings.progress_base_url == "https://here-plumbline.from-the-pod.svc"
    assert str(settings.tls_folder) in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_one_replica_is_recreated_and_probed(helm: str) -> None:
    spec = one(render(helm), "Deployment")["spec"]
    container = spec["template"]["spec"]["containers"][0]
    assert spec["replicas"] == 1
    assert spec["strategy"] == {"type": "Recreate"}
    ports = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] in ports


@pytest.mark.parametrize("name", ["alignmentpipelines", "alignmentruntimes"])
def test_crds_are_the_generated_ones(helm: str, name: str) -> None:
    generated = yaml.safe_load((ROOT / "crds" / f"{name}.yaml").read_text())
    rendered = one(render(helm), "CustomResourceDefinition", name)
    assert rendered["spec"] == generated["spec"]
    assert (CHART / "files" / "crds" / f"{name}.yaml").read_text() == (ROOT / "crds" / f"{name}.yaml").read_text()


def test_crds_are_kept_by_default_left_out_or_given_up_on_wish(helm: str) -> None:
    def policies(*values: str) -> list[str | None]:
        crds = of_kind(render(helm, *values), "CustomResourceDefinition")
        return [item["metadata"].get("annotations", {}).get("helm.sh/resource-policy") for item in crds]

    assert policies() == ["keep", "keep"]
    assert policies("crds.keep=false") == [None, None]
    assert policies("crds.enabled=false") == []


@pytest.mark.parametrize(
    ("values", "place"),
    [
        (("operatr.logLevel=debug",), "operatr"),
        (("operator.image.digset=sha256:0",), "digset"),
        (("operator.logLevel=loud",), "/operator/logLevel"),
        (("operator.image.digest=latest",), "/operator/image/digest"),
        (("crds.keep=maybe",), "/crds/keep"),
        (("runtime.storage.region=eu",), "/runtime/storage"),
        (("runtime.storage.uri=file:///tmp",), "/runtime/storage/uri"),
        (("networkPolicy.enable=true",), "enable"),
        (("runtime.spec.image=mine",), "runtime.spec.image: set runtime.image instead"),
        (("serviceAccount.create=false",), "serviceAccount.name"),
    ],
)
def test_wrong_values_are_refused_by_name(helm: str, values: tuple[str, ...], place: str) -> None:
    assert place in refusal(helm, *values)


def test_schema_describes_exactly_the_default_values() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(value: object, part: dict[str, Any], path: str) -> None:
        if isinstance(value, dict) and "properties" in part:
            assert part["additionalProperties"] is False, path
            known = set(part["properties"]) - ({"global"} if not path else set())
            assert set(value) == known or not value or set(value) <= known, path
            for key, inner in value.items():
                compare(inner, part["properties"][key], f"{path}.{key}")

    compare(values, schema, "")
    assert set(schema["properties"]) - {"global"} == set(values)


def test_digest_wins_over_tag(helm: str) -> None:
    digest = "sha256:" + "a" * 64
    objects = render(
        helm,
        f"operator.image.digest={digest}",
        "operator.image.tag=old",
        "runtime.image.repository=r.example:5000/t",
        f"runtime.image.digest={digest}",
    )
    images = {container["image"] for spec in pod_specs(objects).values() for container in spec["containers"]}
    assert images == {f"plumbline-operator@{digest}"}
    assert default_runtime(objects)["spec"]["image"] == f"r.example:5000/t@{digest}"


def test_default_runtime_is_a_valid_runtime(helm: str, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(
        yaml.safe_dump(
            {
                "runtime": {
                    "storage": {"uri": "s3://bucket/root", "endpoint": "https://s3.example", "secretName": "keys"},
                    "spec": {
                        "accelerator": {"resourceName": "nvidia.com/gpu", "memory": "80Gi"},
                        "classes": {"train": {"gpusPerNode": 8, "cpu": "32", "memory": "400Gi"}},
                        "allow": {"storagePrefixes": ["s3://bucket/root/{namespace}/"]},
                    },
                }
            }
        )
    )
    body = default_runtime(render(helm, arguments=("--values", str(values))))
    runtime = AlignmentRuntime.parse(
        {**body, "metadata": {key: body["metadata"][key] for key in ("name", "annotations")}}
    )
    assert runtime.metadata.annotations["plumbline.dev/is-default-runtime"] == "true"
    assert runtime.spec.storage is not None
    assert runtime.spec.storage.uri == "s3://bucket/root"
    assert runtime.spec.classes.train.gpus_per_node == 8


def test_runtime_is_applied_after_every_change_of_the_release_by_an_account_that_goes_again(helm: str) -> None:
    objects = render(helm, "runtime.name=gpus")
    hooks = [item for item in objects if item["metadata"]["name"] == "here-plumbline-runtime"]
    assert {item["kind"] for item in hooks} == {"ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Job"}
    for item in hooks:
        notes = item["metadata"]["annotations"]
        assert notes["helm.sh/hook"].split(",") == ["post-install", "post-upgrade", "post-rollback"]
        assert notes["helm.sh/hook-delete-policy"].split(",") == ["before-hook-creation", "hook-succeeded"]
        assert (int(notes["helm.sh/hook-weight"]) < 0) == (item["kind"] != "Job")
    rules = next(item["rules"] for item in hooks if item["kind"] == "ClusterRole")
    assert [rule["verbs"] for rule in rules if "resourceNames" not in rule] == [["create"]]
    assert [rule["resourceNames"] for rule in rules if "resourceNames" in rule] == [["gpus"]]
    assert not [
        item
        for item in render(helm, "runtime.create=false")
        if "runtime" in item["metadata"]["name"] and item["kind"] == "Job"
    ]


def test_runtime_survives_the_expansion_of_variables_in_pods(helm: str) -> None:
    container = one(render(helm, "runtime.spec.proxy.noProxy=$(HOME)"), "Job")["spec"]["template"]["spec"][
        "containers"
    ][0]
    assert "$$(HOME)" in next(item["value"] for item in container["env"] if item["name"] == "RUNTIME")
    assert not any("$(" in argument for argument in container["args"])


def test_network_policy_opens_named_ports_only(helm: str) -> None:
    objects = render(helm)
    policy = one(objects, "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    opened = [port["port"] for rule in policy["ingress"] for port in rule["ports"]]
    container = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert sorted(opened) == sorted(port["name"] for port in container["ports"])
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert of_kind(render(helm, "networkPolicy.enabled=false"), "NetworkPolicy") == []


def test_services_select_the_operator_and_no_other_pod(helm: str) -> None:
    objects = render(helm)
    selector = one(objects, "Service")["spec"]["selector"]
    template = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    others = [one(objects, "Pod"), one(objects, "Job")["spec"]["template"]]
    assert selector.items() <= template.items()
    assert not any(selector.items() <= other["metadata"]["labels"].items() for other in others)


def test_every_alert_has_a_runbook_section(helm: str) -> None:
    rules = one(render(helm, *EVERYTHING), "PrometheusRule")["spec"]["groups"]
    alerts = [rule for group in rules for rule in group["rules"]]
    assert alerts
    headings = {
        line.removeprefix("## ").strip().lower()
        for line in (ROOT / "docs" / "runbooks.md").read_text().splitlines()
        if line.startswith("## ")
    }
    for alert in alerts:
        page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        assert page == "docs/runbooks.md"
        assert anchor == alert["alert"].lower()
        assert anchor in headings, f"docs/runbooks.md has no section {alert['alert']}"


def test_chart_and_package_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{chart["version"]}"' in project
    assert chart["appVersion"] == chart["version"]
