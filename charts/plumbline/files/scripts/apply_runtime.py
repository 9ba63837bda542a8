"""Apply the default runtime once the API server serves its kind: a job after install, upgrade and rollback.

Helm maps every object of a release to an API before it creates the first, and never tries twice: a runtime beside its
own CRD would make a first install fail, and an upgrade could lose fields that the old schema does not know. Server-side
apply changes the object in place.
Environment: RUNTIME, the object as JSON.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ACCOUNT = Path(os.environ.get("ACCOUNT_DIR", "/var/run/secrets/kubernetes.io/serviceaccount"))
DEADLINE_SECONDS = 120
PAUSE_SECONDS = 0.5


def apply(runtime: dict[str, object]) -> str | None:
    """Apply the object; None when it is done, else what the API server said."""
    host = os.environ["KUBERNETES_SERVICE_HOST"]
    server = f"https://[{host}]" if ":" in host else f"https://{host}"
    metadata = runtime["metadata"]
    assert isinstance(metadata, dict)
    path = f"/apis/plumbline.dev/v1alpha1/alignmentruntimes/{metadata['name']}"
    query = "fieldManager=plumbline-chart&force=true&fieldValidation=Strict"
    request = urllib.request.Request(
        f"{server}:{os.environ['KUBERNETES_SERVICE_PORT']}{path}?{query}",
        data=json.dumps(runtime).encode(),
        method="PATCH",
        headers={
            "Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}",
            "Content-Type": "application/apply-patch+yaml",
        },
    )
    trust = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    try:
        with urllib.request.urlopen(request, timeout=10, context=trust):
            return None
    except urllib.error.HTTPError as error:
        body = error.read().decode(errors="replace")
        try:
            return f"{error.code} {json.loads(body)['message']}"
        except (ValueError, KeyError):
            return f"{error.code} {body[:500]}"
    except OSError as error:
        return str(error)


def main() -> int:
    """Exit code 0 once the runtime is applied, 1 after the deadline."""
    runtime = json.loads(os.environ["RUNTIME"])
    deadline = time.monotonic() + float(os.environ.get("DEADLINE_SECONDS", DEADLINE_SECONDS))
    # A refusal may be due to a CRD that is not served yet, or not yet in its new version: try again until the deadline.
    while (problem := apply(runtime)) is not None:
        if time.monotonic() > deadline:
            print(f"AlignmentRuntime {runtime['metadata']['name']}: {problem}")
            return 1
        time.sleep(PAUSE_SECONDS)
    print(f"AlignmentRuntime {runtime['metadata']['name']} applied")
    return 0


if __name__ == "__main__":
    sys.exit(main())
