"""The node's network on this machine: one bridge whose address is the node's, and what must be undone afterwards.

Pods, the API server, the S3 server and DNS all meet on the bridge; nothing leaves the machine and no address is translated to the outside.
"""

import ipaddress
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

from cluster.errors import ClusterFailedError
from cluster.packages import find_program_of_system
from cluster.state import ClusterState

BRIDGE = "plumbline0"
TABLE = "plumbline-test"
CNI_NETWORK = "plumbline-test"
POD_SUBNETS = ("10.244.0.0/24", "10.245.0.0/24", "172.31.244.0/24", "192.168.244.0/24")
FORWARDING = "net/ipv4/ip_forward"
BRIDGE_FILTER = "net/bridge/bridge-nf-call-iptables"


def choose_pod_subnet(taken: Iterable[str], candidates: Iterable[str] = POD_SUBNETS) -> str:
    """First candidate that overlaps no route of the machine; default routes do not count."""
    networks = [ipaddress.ip_network(route, strict=False) for route in taken if route not in ("default", "0.0.0.0/0")]
    for candidate in candidates:
        wanted = ipaddress.ip_network(candidate)
        if not any(wanted.overlaps(network) for network in networks if network.version == wanted.version):
            return candidate
    raise ClusterFailedError(f"every subnet the node could use is routed already: {', '.join(candidates)}")


def bridge_address(subnet: str) -> str:
    """The first host of the subnet: address of the bridge and of the node."""
    return str(next(ipaddress.ip_network(subnet).hosts()))


def cni_configuration(subnet: str, data_folder: Path) -> dict[str, object]:
    """CNI configuration list: bridge plug-in, host-local addresses, hairpin so that a pod reaches itself through its service."""
    return {
        "cniVersion": "0.4.0",
        "name": CNI_NETWORK,
        "plugins": [
            {
                "type": "bridge",
                "bridge": BRIDGE,
                "isGateway": False,
                "hairpinMode": True,
                "ipMasq": False,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(data_folder),
                    "ranges": [[{"subnet": subnet, "gateway": bridge_address(subnet)}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
        ],
    }


def run_tool(*command: str, check: bool = True) -> str:
    """Run a system program and return its output; raises ClusterFailedError with its words."""
    program = find_program_of_system(command[0]) or command[0]
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True)
    if check and done.returncode:
        raise ClusterFailedError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def isolation_rules() -> str:
    """nftables script: what pods send to anywhere but the bridge is refused at once, so that nothing of a test leaves the machine."""
    return f"""table inet {TABLE} {{
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "{BRIDGE}" oifname != "{BRIDGE}" reject
    }}
}}
"""


def bridge_exists() -> bool:
    return Path(f"/sys/class/net/{BRIDGE}").exists()


def create_network(state: ClusterState) -> str:
    """Make the bridge and switch forwarding on; records before each step what `remove_network` must undo. Returns the address."""
    if state.network and bridge_exists():
        return state.network["address"]
    routes = json.loads(run_tool("ip", "-json", "-4", "route", "show", "table", "all") or "[]")
    subnet = choose_pod_subnet(route["dst"] for route in routes if "dst" in route)
    address = bridge_address(subnet)
    state.network = {"bridge": BRIDGE, "subnet": subnet, "address": address}
    for setting in (FORWARDING, BRIDGE_FILTER):
        path = Path("/proc/sys") / setting
        if path.exists():
            state.network[setting] = path.read_text().strip()
    state.save()
    run_tool("ip", "link", "add", BRIDGE, "type", "bridge")
    run_tool("ip", "address", "add", f"{address}/{ipaddress.ip_network(subnet).prefixlen}", "dev", BRIDGE)
    run_tool("ip", "link", "set", BRIDGE, "up")
    rules = state.folder / "isolation.nft"
    rules.write_text(isolation_rules())
    run_tool("nft", "--file", str(rules))
    for setting in (FORWARDING, BRIDGE_FILTER):
        if setting in state.network:
            (Path("/proc/sys") / setting).write_text("1")
    return address


def remove_network(state: ClusterState) -> None:
    """Undo `create_network` and remove the tables of kube-proxy and the CNI plug-in's notes."""
    if not state.network:
        return
    for family, table in (("ip", "kube-proxy"), ("ip6", "kube-proxy"), ("inet", TABLE)):
        run_tool("nft", "delete", "table", family, table, check=False)
    if bridge_exists():
        run_tool("ip", "link", "delete", BRIDGE)
    for setting in (FORWARDING, BRIDGE_FILTER):
        if setting in state.network:
            (Path("/proc/sys") / setting).write_text(state.network[setting])
    for note in Path("/var/lib/cni/results").glob(f"{CNI_NETWORK}-*"):
        note.unlink(missing_ok=True)
    state.network = {}
    state.save()
