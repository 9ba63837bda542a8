"""The environment of a trainer pod. Literal values are escaped, because kubelet expands `$(NAME)` and `$$`."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from plumbline_api.pipeline import Storage
from plumbline_api.quantities import parse_duration, parse_quantity
from plumbline_api.runtime import Proxy, RewardEndpoint, RuntimeSpec
from plumbline_api.stagerun import (
    ENDPOINT_TOKEN_KEY,
    PROGRESS_CA_ENV,
    PROGRESS_TOKEN_ENV,
    PROGRESS_URL_ENV,
    STAGE_ENV,
    TERMINATION_LOG_ENV,
    StageRun,
    endpoint_token_env,
)

TMP_PATH = "/tmp"  # noqa: S108 - an empty volume of the pod's own
PROGRESS_PATH = "/var/run/plumbline/progress"
CA_BUNDLE_FILE = "/etc/plumbline/ca/ca.crt"
TERMINATION_LOG = "/dev/termination-log"
MASTER_ADDRESS_ENV = "PLUMBLINE_MASTER_ADDR"
GRACE_ENV = "PLUMBLINE_GRACE_SECONDS"
OUR_PREFIX = "PLUMBLINE_"
SECRET_KEYS = {"AWS_ACCESS_KEY_ID": False, "AWS_SECRET_ACCESS_KEY": False, "AWS_SESSION_TOKEN": True}
"""Keys of a storage secret, and whether each may be absent."""

Env = dict[str, Any]


def pod_environment(
    run: StageRun,
    runtime: RuntimeSpec,
    *,
    class_env: dict[str, str],
    cpu: str,
    progress_url: str | None,
    has_progress_ca: bool,
    master_address: str | None,
) -> list[Env]:
    """Environment of the container, in three layers: defaults, what the runtime sets, what is the contract's.

    Args:
        run: What the trainer is told.
        runtime: The runtime of the record.
        class_env: Variables that the runtime sets for the class; those that begin with PLUMBLINE_ are ours and ignored.
        cpu: CPU request of the pod.
        progress_url: Where to POST progress; None where nobody listens.
        has_progress_ca: Whether the progress service has a certificate authority of its own.
        master_address: Host of rank 0 where several pods work together.
    """
    literal = _defaults(run, cpu) | _trust(runtime, progress_url)
    literal |= {name: value for name, value in class_env.items() if not name.startswith(OUR_PREFIX)}
    literal |= _storage(run.storage) | _hub(run, runtime)
    literal |= {
        STAGE_ENV: run.to_json(),
        TERMINATION_LOG_ENV: TERMINATION_LOG,
        GRACE_ENV: str(grace_for_trainer(parse_duration(runtime.termination_grace_period))),
    }
    if progress_url is not None:
        literal |= {
            PROGRESS_URL_ENV: progress_url,
            PROGRESS_TOKEN_ENV: f"{PROGRESS_PATH}/token",
        }
        if has_progress_ca:
            literal[PROGRESS_CA_ENV] = f"{PROGRESS_PATH}/ca.crt"
    if master_address is not None:
        literal[MASTER_ADDRESS_ENV] = master_address
    secret = run.storage.secret_name
    keys = SECRET_KEYS if secret is not None else {}
    secrets = [_from_secret(key, key, str(secret), optional) for key, optional in keys.items()]
    for endpoint in _asked(run):
        if endpoint.secret_name is not None:
            name = endpoint_token_env(endpoint.name)
            secrets.append(_from_secret(name, ENDPOINT_TOKEN_KEY, endpoint.secret_name, optional=False))
    kept = {item["name"] for item in secrets}
    plain = [{"name": name, "value": escaped(value)} for name, value in sorted(literal.items()) if name not in kept]
    return [*secrets, *plain]


def _asked(run: StageRun) -> list[RewardEndpoint]:
    """The reward endpoints that a trainer asks; preflight tries those of all stages."""
    if run.role == "preflight" and run.record is not None:
        return run.record.endpoints or []
    return run.endpoints or []


def escaped(value: str) -> str:
    """A value that kubelet's expansion turns into the given one."""
    return value.replace("$", "$$")


def grace_for_trainer(seconds: float) -> int:
    """The part of the grace period that a checkpoint may take; the rest is for uploading the result and the exit."""
    return max(int(seconds - max(5.0, 0.1 * seconds)), 1)


def _defaults(run: StageRun, cpu: str) -> dict[str, str]:
    threads = max(int(parse_quantity(cpu)) // run.processes_per_node, 1)
    return {
        "HOME": TMP_PATH,
        "TMPDIR": TMP_PATH,
        "XDG_CACHE_HOME": f"{TMP_PATH}/cache",
        "HF_HOME": f"{TMP_PATH}/huggingface",
        "MPLCONFIGDIR": f"{TMP_PATH}/matplotlib",
        "USER": "plumbline",  # torch asks for a name, and not every image knows the user id
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": str(threads),
    }


def _trust(runtime: RuntimeSpec, progress_url: str | None) -> dict[str, str]:
    found: dict[str, str] = {}
    if runtime.ca_bundle_config_map is not None:
        names = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE")
        found |= dict.fromkeys(names, CA_BUNDLE_FILE)
    proxy = runtime.proxy or Proxy()
    direct = [proxy.no_proxy] if proxy.no_proxy is not None else []
    if runtime.proxy is not None and progress_url is not None:
        direct += filter(None, [urlsplit(progress_url).hostname])  # a service of the cluster, not of the world outside
    for name, value in (
        ("http_proxy", proxy.http_proxy),
        ("https_proxy", proxy.https_proxy),
        ("no_proxy", ",".join(direct) or None),
    ):
        if value is not None:
            found |= {name: value, name.upper(): value}
    return found


def _storage(storage: Storage) -> dict[str, str]:
    found: dict[str, str] = {}
    if storage.endpoint is not None:
        found["AWS_ENDPOINT_URL"] = storage.endpoint
    if storage.region is not None:
        found |= {"AWS_REGION": storage.region, "AWS_DEFAULT_REGION": storage.region}
    if storage.secret_name is not None:
        # With keys of its own a pod never asks the node for the node's identity.
        found["AWS_EC2_METADATA_DISABLED"] = "true"
    return found


def _hub(run: StageRun, runtime: RuntimeSpec) -> dict[str, str]:
    """Only preflight talks to the hub; everything else reads what it pinned."""
    if run.role != "preflight":
        return {"HF_HUB_OFFLINE": "1"}
    return {"HF_ENDPOINT": runtime.hub_endpoint} if runtime.hub_endpoint is not None else {}


def _from_secret(variable: str, key: str, secret: str, optional: bool) -> Env:
    reference: Env = {"name": secret, "key": key}
    if optional:
        reference["optional"] = True
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}
