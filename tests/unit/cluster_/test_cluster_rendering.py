"""What the test cluster renders: certificates, arguments, configuration, image archives."""

import io
import ipaddress
import json
import tarfile
from pathlib import Path

import pytest
import yaml
from cluster.busybox import busybox_layer, digest
from cluster.certificates import Authority, write_kubeconfig, write_service_account_keys
from cluster.controlplane import ControlPlanePlan, apiserver_arguments, audit_policy, choose_free_ports, etcd_arguments
from cluster.errors import ClusterFailedError
from cluster.kind import gateway_of_network, kind_configuration
from cluster.network import bridge_address, choose_pod_subnet, cni_configuration
from cluster.node import containerd_configuration, corefile, dns_service, kubelet_configuration
from cluster.objectstore import server_arguments
from cluster.state import ClusterState
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@pytest.fixture
def plan(tmp_path: Path) -> ControlPlanePlan:
    return ControlPlanePlan(tmp_path, "127.0.0.1", 6443, 2379, 2380)


def test_certificates_are_signed_by_the_authority_and_name_their_hosts(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server", "kube-apiserver", ("system:masters",), hosts=("localhost", "10.96.0.1"))
    certificate = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
    issuer = x509.load_pem_x509_certificate(authority.pair.certificate.read_bytes())
    certificate.verify_directly_issued_by(issuer)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.96.0.1")]
    assert certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value == "system:masters"


def test_a_loaded_authority_signs_for_the_same_root(tmp_path: Path) -> None:
    first = Authority(tmp_path)
    pair = Authority(tmp_path).issue("client", "someone")
    issuer = x509.load_pem_x509_certificate(first.pair.certificate.read_bytes())
    x509.load_pem_x509_certificate(pair.certificate.read_bytes()).verify_directly_issued_by(issuer)
    assert isinstance(issuer.public_key(), ec.EllipticCurvePublicKey)


def test_private_keys_and_kubeconfigs_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    client = authority.issue("client", "someone")
    kubeconfig = write_kubeconfig(tmp_path / "kubeconfig", "https://127.0.0.1:1", authority.pair, client)
    accounts = write_service_account_keys(tmp_path)
    for path in (authority.pair.key, client.key, kubeconfig, accounts.key):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_control_plane_alone_listens_on_loopback_only(plan: ControlPlanePlan, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server", "kube-apiserver", hosts=("localhost",))
    arguments = apiserver_arguments(plan, pair, pair, pair)
    assert "--bind-address=127.0.0.1" in arguments
    assert "--authorization-mode=Node,RBAC" in arguments
    assert all("127.0.0.1" in argument for argument in etcd_arguments(plan) if "-urls=" in argument)


def test_audit_policy_keeps_the_bodies_of_created_jobs_and_every_write() -> None:
    rules = audit_policy()["rules"]
    assert isinstance(rules, list)
    assert rules[-1] == {"level": "Metadata"}
    dropped = [rule for rule in rules if rule["level"] == "None"]
    for rule in dropped:
        reads_only = set(rule.get("verbs", [])) <= {"get", "list", "watch"} and rule.get("verbs")
        assert reads_only or rule.get("nonResourceURLs") or rule["resources"][0]["resources"] == ["leases"]
    assert any(rule["level"] == "Request" and rule["verbs"] == ["create"] for rule in rules)


def test_free_ports_differ() -> None:
    ports = choose_free_ports("127.0.0.1", 8)
    assert len(set(ports)) == 8


@pytest.mark.parametrize(
    ("routes", "chosen"),
    [
        (["default", "192.0.2.0/24"], "10.244.0.0/24"),
        (["10.244.0.0/16"], "10.245.0.0/24"),
        (["10.0.0.0/8"], "172.31.244.0/24"),
        (["10.0.0.0/8", "172.16.0.0/12", "fd00::/64"], "192.168.244.0/24"),
    ],
)
def test_pod_subnet_avoids_routes_of_the_machine(routes: list[str], chosen: str) -> None:
    assert choose_pod_subnet(routes) == chosen


def test_no_free_pod_subnet_is_an_error_that_names_the_candidates() -> None:
    with pytest.raises(ClusterFailedError, match=r"10\.244\.0\.0/24.*192\.168\.244\.0/24"):
        choose_pod_subnet(["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"])


def test_bridge_configuration_gives_pods_the_bridge_as_gateway(tmp_path: Path) -> None:
    plugin = cni_configuration("10.244.0.0/24", tmp_path)["plugins"][0]  # type: ignore[index]
    assert plugin["ipam"]["ranges"] == [[{"subnet": "10.244.0.0/24", "gateway": bridge_address("10.244.0.0/24")}]]
    assert plugin["ipam"]["dataDir"] == str(tmp_path)


def test_containerd_configuration_is_valid_toml_with_quoted_paths(tmp_path: Path) -> None:
    import tomllib

    text = containerd_configuration(tmp_path / 'odd "name"', tmp_path / "run", tmp_path / "cni", Path("/usr/lib/cni"))
    document = tomllib.loads(text)
    assert document["root"] == str(tmp_path / 'odd "name"')
    assert document["plugins"]["io.containerd.grpc.v1.cri"]["restrict_oom_score_adj"] is True


def test_kubelet_refuses_anonymous_and_writes_below_the_state_folder(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "certificates")
    state = ClusterState(tmp_path)
    document = kubelet_configuration(state, "10.244.0.1", 10250, authority.pair, authority.pair)
    assert document["authentication"]["anonymous"] == {"enabled": False}
    assert document["authorization"] == {"mode": "Webhook"}
    assert document["podLogsDir"].startswith(str(tmp_path))
    assert document["readOnlyPort"] == 0


def test_dns_service_points_to_the_bridge() -> None:
    service, endpoints = yaml.safe_load_all(dns_service("10.244.0.1"))
    assert "selector" not in service["spec"]
    assert endpoints["endpoints"][0]["addresses"] == ["10.244.0.1"]
    assert endpoints["metadata"]["labels"]["kubernetes.io/service-name"] == service["metadata"]["name"]
    assert "bind 10.244.0.1" in corefile("10.244.0.1", Path("/kubeconfig"), 1)


def test_keys_of_the_object_store_are_not_on_its_command_line(tmp_path: Path) -> None:
    arguments = server_arguments("127.0.0.1", 7070, tmp_path)
    assert arguments[:2] == ["--port", "127.0.0.1:7070"]
    assert not {"--access", "--secret", "-a", "-s"} & set(arguments)


def test_busybox_layer_is_reproducible_and_links_its_applets() -> None:
    layer = busybox_layer(b"program")
    assert digest(layer) == digest(busybox_layer(b"program"))
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        assert archive.getmember("bin/sh").linkname == "busybox"
        assert archive.getmember("tmp").mode == 0o1777


def test_kind_configuration_mounts_our_audit_policy_and_log(tmp_path: Path) -> None:
    node = kind_configuration(tmp_path, "v1.34.4")["nodes"][0]  # type: ignore[index]
    assert node["image"] == "kindest/node:v1.34.0"
    patch = yaml.safe_load(node["kubeadmConfigPatches"][0])
    assert patch["apiServer"]["extraArgs"]["audit-log-path"].startswith(node["extraMounts"][1]["containerPath"])
    assert json.dumps(node).count(str(tmp_path)) == 2


@pytest.mark.parametrize(
    "network",
    [
        {"IPAM": {"Config": [{"Subnet": "fc00::/64", "Gateway": "fc00::1"}, {"Gateway": "172.18.0.1"}]}},
        {"subnets": [{"gateway": "172.18.0.1"}]},
    ],
)
def test_gateway_of_docker_and_podman_networks(network: dict[str, object]) -> None:
    assert gateway_of_network(network) == "172.18.0.1"
