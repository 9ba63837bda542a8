"""One real node: containerd and runc from the distribution, kubelet, kube-proxy and CoreDNS from source, pods on a bridge.

Settings that look odd were each found by failing without them: `restrict_oom_score_adj` and `oomScoreAdj: 0` for machines without
CAP_SYS_RESOURCE, `failCgroupV1`/`failSwapOn` for old or swapping hosts, `maxPerCore: 0` where conntrack limits cannot be written.
containerd's root lies in the cache folder, so that an image is loaded once per machine and not once per cluster.
"""

import hashlib
import json
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from cluster.binaries import find_program
from cluster.busybox import write_busybox_archive
from cluster.certificates import Authority, KeyPair, write_kubeconfig
from cluster.controlplane import choose_free_ports, fetch
from cluster.errors import ClusterFailedError
from cluster.network import cni_configuration, run_tool
from cluster.packages import find_program_of_system
from cluster.places import cache_root
from cluster.state import ClusterState, wait_until

NODE_NAME = "plumbline-node"
DNS_SERVICE_ADDRESS = "10.96.0.10"
BUSYBOX_IMAGE = "localhost/plumbline-busybox:test"
CONTAINERD_NAMESPACE = "k8s.io"


def run_folder(state: ClusterState) -> Path:
    """Short path for sockets (their names are limited to 107 characters) and for containerd's running state."""
    return Path("/run") / f"plumbline-{hashlib.sha256(str(state.folder).encode()).hexdigest()[:8]}"


def containerd_root() -> Path:
    return cache_root() / "containerd"


def containerd_configuration(root: Path, run: Path, cni_folder: Path, cni_programs: Path) -> str:
    """TOML of containerd 1.6 and newer 1.x (configuration version 2)."""
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""version = 2
root = {json.dumps(str(root))}
state = {json.dumps(str(run / "containerd"))}
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]

[grpc]
address = {json.dumps(str(run / "containerd.sock"))}

[{cri}]
sandbox_image = "{BUSYBOX_IMAGE}"
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
stream_server_address = "127.0.0.1"
stream_server_port = "0"

[{cri}.cni]
bin_dir = {json.dumps(str(cni_programs))}
conf_dir = {json.dumps(str(cni_folder))}

[{cri}.containerd]
snapshotter = "overlayfs"
default_runtime_name = "runc"

[{cri}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[{cri}.containerd.runtimes.runc.options]
SystemdCgroup = false
"""


def kubelet_configuration(
    state: ClusterState, address: str, port: int, serving: KeyPair, authority: KeyPair
) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": address,
        "port": port,
        "healthzPort": 0,
        "readOnlyPort": 0,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(authority.certificate)},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(serving.certificate),
        "tlsPrivateKeyFile": str(serving.key),
        "clusterDNS": [DNS_SERVICE_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": "",
        "containerRuntimeEndpoint": f"unix://{run_folder(state) / 'containerd.sock'}",
        "cgroupDriver": "cgroupfs",
        "failSwapOn": False,
        "failCgroupV1": False,
        "oomScoreAdj": 0,
        "makeIPTablesUtilChains": False,
        "podLogsDir": str(state.folder / "pod-logs"),
        "volumePluginDir": str(state.folder / "kubelet" / "volume-plugins"),
        # The disk is shared with everything else on this machine: its fill level must not evict test pods or collect our images.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "eventRecordQPS": 0,
        "kubeAPIQPS": 200,
        "kubeAPIBurst": 400,
        "syncFrequency": "10s",
        "maxPods": 110,
    }


def proxy_configuration(kubeconfig: Path, subnet: str, health_port: int, metrics_port: int) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "clusterCIDR": subnet,
        "hostnameOverride": NODE_NAME,
        "healthzBindAddress": f"127.0.0.1:{health_port}",
        "metricsBindAddress": f"127.0.0.1:{metrics_port}",
        "oomScoreAdj": 0,
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "nftables": {"minSyncPeriod": "100ms"},
    }


def corefile(address: str, kubeconfig: Path, ready_port: int) -> str:
    """CoreDNS on the bridge; names outside the cluster are refused, as pods have no way out."""
    return f""".:53 {{
    bind {address}
    errors
    ready 127.0.0.1:{ready_port}
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {kubeconfig} plumbline-test
        ttl 2
    }}
    cache 2
}}
"""


def dns_service(address: str) -> str:
    """Service `kube-dns` at the address that the kubelet tells pods, backed by CoreDNS on the bridge."""
    ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
    name = {"name": "kube-dns", "namespace": "kube-system"}
    return yaml.safe_dump_all(
        [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": name,
                "spec": {"clusterIP": DNS_SERVICE_ADDRESS, "ports": ports},
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {**name, "labels": {"kubernetes.io/service-name": "kube-dns"}},
                "addressType": "IPv4",
                "ports": ports,
                "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
            },
        ]
    )


def find_cni_programs() -> Path:
    """Folder of the CNI plug-ins; distributions differ."""
    for folder in ("/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"):
        if (Path(folder) / "bridge").exists():
            return Path(folder)
    raise ClusterFailedError("no CNI bridge plug-in in /usr/lib/cni, /opt/cni/bin or /usr/libexec/cni")


def containerd_client(state: ClusterState, *arguments: str, check: bool = True) -> str:
    """Run `ctr` in Kubernetes' namespace of our containerd and return its output."""
    socket = str(run_folder(state) / "containerd.sock")
    return run_tool("ctr", "--address", socket, "--namespace", CONTAINERD_NAMESPACE, *arguments, check=check)


def start_containerd(state: ClusterState) -> None:
    """Start containerd and load the busybox image, which is the pod sandbox too."""
    run, cni = run_folder(state), state.folder / "cni"
    for folder in (run, cni, containerd_root()):
        folder.mkdir(parents=True, exist_ok=True)
    (cni / "10-plumbline.conflist").write_text(
        json.dumps(cni_configuration(state.network["subnet"], state.folder / "cni-addresses"), indent=2)
    )
    configuration = state.folder / "containerd.toml"
    configuration.write_text(containerd_configuration(containerd_root(), run, cni, find_cni_programs()))
    containerd = find_program_of_system("containerd")
    assert containerd is not None
    state.start("containerd", [containerd, "--config", str(configuration)])
    wait_until(
        lambda: "SERVER" in containerd_client(state, "version", check=False).upper(),
        "containerd answers",
        state,
        "containerd",
    )
    if BUSYBOX_IMAGE not in containerd_client(state, "images", "list", "--quiet").split():
        archive = state.folder / "busybox.tar"
        write_busybox_archive(archive, BUSYBOX_IMAGE)
        containerd_client(state, "images", "import", str(archive))
        archive.unlink()
    state.images["busybox"] = BUSYBOX_IMAGE
    state.save()


def start_node(state: ClusterState) -> None:
    """Start what does not run yet of containerd, kubelet, kube-proxy and CoreDNS; returns when the node is Ready and DNS answers."""
    for name in ("kubelet", "kube-proxy", "kubectl", "coredns"):
        find_program(name)
    start_containerd(state)
    authority = Authority(state.folder / "certificates")
    for name, start in (("kubelet", start_kubelet), ("kube-proxy", start_proxy), ("coredns", start_dns)):
        if state.process(name) is None:
            start(state, authority)
    admin = KeyPair(authority.folder / "admin.crt", authority.folder / "admin.key")
    ready = f"http://127.0.0.1:{state.network['dns-ready-port']}/ready"
    wait_until(lambda: answers(ready), "cluster DNS ready", state, "coredns")
    wait_until(lambda: node_is_ready(state.server, authority.pair, admin), "node Ready", state, "kubelet", 120)
    wait_until(
        lambda: "kube-proxy" in run_tool("nft", "list", "tables", check=False),
        "service rules written",
        state,
        "kube-proxy",
    )


def start_kubelet(state: ClusterState, authority: Authority) -> None:
    address = state.network["address"]
    port = choose_free_ports(address, 1)[0]
    pair = authority.issue(
        "kubelet", f"system:node:{NODE_NAME}", ("system:nodes",), hosts=(NODE_NAME, address, "127.0.0.1")
    )
    kubeconfig = write_kubeconfig(state.folder / "kubelet.kubeconfig", state.server, authority.pair, pair)
    configuration = state.folder / "kubelet.yaml"
    configuration.write_text(yaml.safe_dump(kubelet_configuration(state, address, port, pair, authority.pair)))
    arguments = [
        f"--config={configuration}",
        f"--kubeconfig={kubeconfig}",
        f"--root-dir={state.folder / 'kubelet'}",
        f"--cert-dir={state.folder / 'kubelet' / 'pki'}",
        f"--hostname-override={NODE_NAME}",
        f"--node-ip={address}",
    ]
    state.start("kubelet", [str(find_program("kubelet")), *arguments], system_path())


def start_proxy(state: ClusterState, authority: Authority) -> None:
    client = authority.issue("kube-proxy", "system:kube-proxy")
    kubeconfig = write_kubeconfig(state.folder / "kube-proxy.kubeconfig", state.server, authority.pair, client)
    configuration = state.folder / "kube-proxy.yaml"
    ports = choose_free_ports("127.0.0.1", 2)
    configuration.write_text(yaml.safe_dump(proxy_configuration(kubeconfig, state.network["subnet"], *ports)))
    state.start("kube-proxy", [str(find_program("kube-proxy")), f"--config={configuration}"], system_path())


def start_dns(state: ClusterState, authority: Authority) -> None:
    address = state.network["address"]
    client = authority.issue("coredns", "plumbline-test-dns", ("system:masters",))
    kubeconfig = write_kubeconfig(state.folder / "coredns.kubeconfig", state.server, authority.pair, client)
    ready_port = choose_free_ports("127.0.0.1", 1)[0]
    state.network["dns-ready-port"] = str(ready_port)
    configuration = state.folder / "Corefile"
    configuration.write_text(corefile(address, kubeconfig, ready_port))
    state.start("coredns", [str(find_program("coredns")), "-conf", str(configuration)])
    manifest = state.folder / "dns.yaml"
    manifest.write_text(dns_service(address))
    run_tool(
        str(find_program("kubectl")), f"--kubeconfig={state.kubeconfig}", "apply", "--server-side", "-f", str(manifest)
    )


def answers(url: str) -> bool:
    """Whether a plain HTTP GET succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def system_path() -> dict[str, str]:
    """PATH that contains nft, mount and conntrack also for a caller whose own lacks the sbin folders."""
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


def node_is_ready(server: str, authority: KeyPair, client: KeyPair) -> bool:
    answer = fetch(server, f"/api/v1/nodes/{NODE_NAME}", authority, client)
    if answer is None:
        return False
    node = json.loads(answer)
    conditions = {condition["type"]: condition["status"] for condition in node.get("status", {}).get("conditions", [])}
    tainted = any(taint["key"].startswith("node.kubernetes.io/") for taint in node["spec"].get("taints", []))
    return conditions.get("Ready") == "True" and not tainted
