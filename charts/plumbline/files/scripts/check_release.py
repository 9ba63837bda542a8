"""`helm test`: the kinds answer, the operator is well, and its progress server refuses strangers.

Environment: HEALTH_URL, METRICS_URL, PROGRESS_URL.
"""

import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

ACCOUNT = Path(os.environ.get("ACCOUNT_DIR", "/var/run/secrets/kubernetes.io/serviceaccount"))


def check_kinds() -> str:
    """The operator's account may list pipelines and runtimes."""
    host = os.environ["KUBERNETES_SERVICE_HOST"]
    server = f"https://[{host}]" if ":" in host else f"https://{host}"
    base = f"{server}:{os.environ['KUBERNETES_SERVICE_PORT']}/apis/plumbline.dev/v1alpha1"
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    counts = []
    for resource in ("alignmentpipelines", "alignmentruntimes"):
        token = {"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}"}
        request = urllib.request.Request(f"{base}/{resource}?limit=500", headers=token)
        with urllib.request.urlopen(request, timeout=10, context=trust) as reply:
            counts.append(f"{len(json.load(reply)['items'])} {resource}")
    return ", ".join(counts)


def check_health() -> str:
    """The operator says that its loop moves."""
    with urllib.request.urlopen(os.environ["HEALTH_URL"], timeout=10) as reply:
        return f"health {reply.status}"


def check_metrics() -> str:
    """Metrics are in Prometheus' text format and hold ours."""
    with urllib.request.urlopen(os.environ["METRICS_URL"], timeout=10) as reply:
        names = {line.split()[2] for line in reply.read().decode().splitlines() if line.startswith("# TYPE plumbline_")}
    if not names:
        raise ValueError("no metric of the operator's own")
    return f"{len(names)} metrics"


def check_progress() -> str:
    """A report without a token is refused."""
    # Only trainers hold the authority of the operator's certificate; what is asked is whether the door is shut.
    trust = ssl.create_default_context()
    trust.check_hostname = False
    trust.verify_mode = ssl.CERT_NONE
    request = urllib.request.Request(os.environ["PROGRESS_URL"], data=b"{}", method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10, context=trust) as reply:
            raise ValueError(f"a report without a token was answered {reply.status}")
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise
        return f"progress refuses strangers ({error.code})"


def main() -> int:
    """Run every check and print one line for each; exit code 1 if one failed."""
    failed = 0
    checks: tuple[Callable[[], str], ...] = (check_kinds, check_health, check_metrics, check_progress)
    for check in checks:
        try:
            print(f"ok    {check.__name__}: {check()}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAIL  {check.__name__}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
