"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler as plain processes, in a few seconds.

Arguments are rendered purely from `ControlPlanePlan`; `start_control_plane` does the rest. Without a node everything listens on loopback
on free ports, needs no root and any number of control planes can run side by side.
"""

import json
import socket
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.binaries import find_program
from cluster.certificates import Authority, KeyPair, write_kubeconfig, write_service_account_keys
from cluster.errors import ClusterFailedError
from cluster.state import ClusterState, wait_until

SERVICE_SUBNET = "10.96.0.0/16"
SERVICE_ADDRESS = "10.96.0.1"
ATTEMPTS = 3  # another process may take a port between our choosing it and binding it


@dataclass(frozen=True)
class ControlPlanePlan:
    """Everything that the command lines are made of."""

    folder: Path
    address: str
    api_port: int
    etcd_port: int
    etcd_peer_port: int
    service_subnet: str = SERVICE_SUBNET

    @property
    def server(self) -> str:
        return f"https://{self.address}:{self.api_port}"

    @property
    def certificates(self) -> Path:
        return self.folder / "certificates"


def choose_free_ports(address: str, count: int) -> list[int]:
    """Different TCP ports that nothing listens on at that address now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind((address, 0))
        return [opened.getsockname()[1] for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()


def audit_policy() -> dict[str, object]:
    """What the API server writes down: every write by anyone, the body of created Jobs, and the reads of non-system users.

    Leases and the reads of Kubernetes' own parts are noise and left out.
    """
    return {
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [
            {"level": "None", "resources": [{"group": "coordination.k8s.io", "resources": ["leases"]}]},
            {"level": "None", "nonResourceURLs": ["/healthz*", "/livez*", "/readyz*", "/version", "/openapi/*"]},
            {
                "level": "None",
                "verbs": ["get", "list", "watch"],
                "userGroups": ["system:nodes", "system:masters", "system:serviceaccounts:kube-system"],
            },
            {
                "level": "None",
                "verbs": ["get", "list", "watch"],
                "users": [
                    "system:apiserver",
                    "system:kube-controller-manager",
                    "system:kube-scheduler",
                    "system:kube-proxy",
                ],
            },
            {
                "level": "Request",
                "verbs": ["create"],
                "resources": [{"group": "batch", "resources": ["jobs"]}],
            },
            {"level": "Metadata"},
        ],
    }


def etcd_arguments(plan: ControlPlanePlan) -> list[str]:
    client, peer = f"http://127.0.0.1:{plan.etcd_port}", f"http://127.0.0.1:{plan.etcd_peer_port}"
    return [
        "--name=test",
        f"--data-dir={plan.folder / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=test={peer}",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def apiserver_arguments(
    plan: ControlPlanePlan, serving: KeyPair, kubelet_client: KeyPair, accounts: KeyPair
) -> list[str]:
    authority = plan.certificates / "ca.crt"
    return [
        f"--etcd-servers=http://127.0.0.1:{plan.etcd_port}",
        f"--bind-address={plan.address}",
        f"--advertise-address={plan.address}",
        f"--secure-port={plan.api_port}",
        f"--service-cluster-ip-range={plan.service_subnet}",
        f"--tls-cert-file={serving.certificate}",
        f"--tls-private-key-file={serving.key}",
        f"--client-ca-file={authority}",
        f"--kubelet-certificate-authority={authority}",
        f"--kubelet-client-certificate={kubelet_client.certificate}",
        f"--kubelet-client-key={kubelet_client.key}",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={accounts.certificate}",
        f"--service-account-signing-key-file={accounts.key}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--audit-policy-file={plan.folder / 'audit-policy.yaml'}",
        f"--audit-log-path={plan.folder / 'logs' / 'audit.log'}",
        "--audit-log-maxsize=4096",
        "--endpoint-reconciler-type=lease" if plan.address != "127.0.0.1" else "--endpoint-reconciler-type=none",
        "--max-requests-inflight=800",
        "--max-mutating-requests-inflight=400",
    ]


def controller_manager_arguments(plan: ControlPlanePlan, kubeconfig: Path, accounts: KeyPair) -> list[str]:
    return [
        f"--kubeconfig={kubeconfig}",
        f"--root-ca-file={plan.certificates / 'ca.crt'}",
        f"--service-account-private-key-file={accounts.key}",
        "--use-service-account-credentials=true",
        "--leader-elect=false",
        "--secure-port=0",
        # Kubernetes' default client rate (20/s) would be what a load test measures.
        "--kube-api-qps=1000",
        "--kube-api-burst=2000",
        "--concurrent-job-syncs=20",
        "--concurrent-gc-syncs=20",
        "--concurrent-namespace-syncs=20",
        "--namespace-sync-period=30s",
        "--terminated-pod-gc-threshold=12500",
    ]


def scheduler_arguments(kubeconfig: Path) -> list[str]:
    return [
        f"--kubeconfig={kubeconfig}",
        "--leader-elect=false",
        "--secure-port=0",
        "--kube-api-qps=1000",
        "--kube-api-burst=2000",
    ]


def start_control_plane(state: ClusterState, address: str = "127.0.0.1") -> ControlPlanePlan:
    """Bring the control plane up and write the administrator's kubeconfig; returns when the API server is ready.

    Raises ClusterUnavailableError without Go and ClusterFailedError, with the log, when a part does not start.
    """
    programs = {
        name: str(find_program(name))
        for name in ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
    }
    for attempt in range(1, ATTEMPTS + 1):
        api_port = choose_free_ports(address, 1)[0]
        etcd_port, etcd_peer_port = choose_free_ports("127.0.0.1", 2)
        plan = ControlPlanePlan(state.folder, address, api_port, etcd_port, etcd_peer_port)
        try:
            _start(state, plan, programs)
            return plan
        except ClusterFailedError as failure:
            state.stop("kube-apiserver", "etcd")
            if attempt == ATTEMPTS or "address already in use" not in str(failure):
                raise
    raise AssertionError("unreachable")


def _start(state: ClusterState, plan: ControlPlanePlan, programs: dict[str, str]) -> None:
    state.folder.mkdir(parents=True, exist_ok=True)
    (state.folder / "logs").mkdir(exist_ok=True)
    state.start("etcd", [programs["etcd"], *etcd_arguments(plan)])
    authority = Authority(plan.certificates)
    service_address = plan.service_subnet.rsplit(".", 1)[0] + ".1"
    serving = authority.issue(
        "kube-apiserver",
        "kube-apiserver",
        hosts=(
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
            "localhost",
            "127.0.0.1",
            service_address,
            plan.address,
        ),
    )
    kubelet_client = authority.issue("apiserver-kubelet-client", "kube-apiserver-kubelet-client", ("system:masters",))
    accounts = write_service_account_keys(plan.certificates)
    (state.folder / "audit-policy.yaml").write_text(yaml.safe_dump(audit_policy(), sort_keys=False))
    state.start(
        "kube-apiserver",
        [programs["kube-apiserver"], *apiserver_arguments(plan, serving, kubelet_client, accounts)],
    )
    admin = authority.issue("admin", "plumbline-test-admin", ("system:masters",))
    write_kubeconfig(state.kubeconfig, plan.server, authority.pair, admin)
    kubeconfigs = {
        part: write_kubeconfig(
            state.folder / f"{part}.kubeconfig", plan.server, authority.pair, authority.issue(part, f"system:{part}")
        )
        for part in ("kube-controller-manager", "kube-scheduler")
    }
    state.server = plan.server
    state.save()
    wait_until(lambda: answers_ready(plan.server, authority.pair, admin), "API server ready", state, "kube-apiserver")
    state.start(
        "kube-controller-manager",
        [
            programs["kube-controller-manager"],
            *controller_manager_arguments(plan, kubeconfigs["kube-controller-manager"], accounts),
        ],
    )
    state.start("kube-scheduler", [programs["kube-scheduler"], *scheduler_arguments(kubeconfigs["kube-scheduler"])])
    wait_until(
        lambda: default_account_exists(plan.server, authority.pair, admin),
        "service account `default` made by the controller manager",
        state,
        "kube-controller-manager",
    )


def fetch(server: str, path: str, authority: KeyPair, client: KeyPair) -> bytes | None:
    """Body of a GET on the API server as a client, or None while it does not answer with success."""
    context = ssl.create_default_context(cafile=str(authority.certificate))
    context.load_cert_chain(client.certificate, client.key)
    try:
        with urllib.request.urlopen(server + path, context=context, timeout=5) as response:
            body: bytes = response.read()
            return body
    except (urllib.error.URLError, OSError):
        return None


def answers_ready(server: str, authority: KeyPair, client: KeyPair) -> bool:
    return fetch(server, "/readyz", authority, client) == b"ok"


def default_account_exists(server: str, authority: KeyPair, client: KeyPair) -> bool:
    """Pods can be created only once the controller manager has made the namespace's service account and CA bundle."""
    account = fetch(server, "/api/v1/namespaces/default/serviceaccounts/default", authority, client)
    bundle = fetch(server, "/api/v1/namespaces/default/configmaps/kube-root-ca.crt", authority, client)
    return bool(account and bundle and "ca.crt" in json.loads(bundle)["data"])
