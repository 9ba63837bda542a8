"""The network policy for tenants is valid, selects what the operator starts, and opens the ports that are there."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
POLICIES = list(yaml.safe_load_all((ROOT / "docs/tenant-networkpolicy.yaml").read_text()))
ROLE = "plumbline.dev/role"
GOLDEN = ROOT / "tests/unit/operator_/golden"


def labels_of(name: str) -> dict[str, str]:
    """Labels of the pods of a golden Job."""
    job = next(item for item in yaml.safe_load_all((GOLDEN / name).read_text()) if item["kind"] == "Job")
    return dict(job["spec"]["template"]["metadata"]["labels"])


def selected(policy: dict[str, Any], labels: dict[str, str]) -> bool:
    return policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("version", ["1.31.0", "1.34.0"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["metadata"]["name"])
def test_it_fits_the_schema_of_kubernetes(policy: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(policy, version, strict=True)


def test_every_pod_of_the_operator_is_shut_in_and_only_preflight_gets_out() -> None:
    shut, hub = POLICIES
    files = sorted(path.name for path in GOLDEN.glob("*.yaml") if "kind: Job" in path.read_text())
    assert {"preflight.yaml", "finalize.yaml"} < set(files), "stages as well"
    assert shut["spec"]["policyTypes"] == ["Ingress", "Egress"], "what is not named is denied"
    assert all(selected(shut, labels_of(name)) for name in files)
    assert [name for name in files if selected(hub, labels_of(name))] == ["preflight.yaml"]


def test_pods_of_one_stage_reach_each_other() -> None:
    spec = POLICIES[0]["spec"]
    stage = next(labels for path in GOLDEN.glob("*.yaml") if (labels := labels_of(path.name)).get(ROLE) == "stage")
    for peers in (spec["ingress"][0]["from"], spec["egress"][0]["to"]):
        assert peers[0]["podSelector"]["matchLabels"].items() <= stage.items()


def test_the_progress_service_is_reached_at_the_port_of_its_pods() -> None:
    deployment = (ROOT / "charts/plumbline/templates/deployment.yaml").read_text()
    helpers = (ROOT / "charts/plumbline/templates/_helpers.tpl").read_text()
    (rule,) = [rule for rule in POLICIES[0]["spec"]["egress"] if "podSelector" in rule["to"][0] and "ports" in rule]
    (port,) = [port["port"] for port in rule["ports"]]
    assert f"{{name: progress, containerPort: {port}, protocol: TCP}}" in deployment
    assert rule["to"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "plumbline"}
    assert "app.kubernetes.io/name: " in helpers.partition('define "plumbline.selectorLabels"')[2].partition("end -")[0]
