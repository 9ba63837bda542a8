"""An HTTP server that answers the few requests the command makes to a cluster, and a kubeconfig that points to it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

PREFIX = "/apis/plumbline.dev/v1alpha1/namespaces/"
RUNTIMES = "/apis/plumbline.dev/v1alpha1/alignmentruntimes/"


class ApiStub:
    """Objects by namespace and name; every request is kept."""

    def __init__(self) -> None:
        self.pipelines: dict[tuple[str, str], dict[str, Any]] = {}
        self.runtimes: dict[str, dict[str, Any]] = {}
        self.pods: list[dict[str, Any]] = []
        self.logs: dict[str, str] = {}
        self.requests: list[tuple[str, str, Any]] = []
        self.failure: tuple[int, dict[str, Any]] | None = None
        self.knows_pipelines = True
        self.url = ""

    def answer(self, method: str, target: str, body: Any) -> tuple[int, Any]:
        """The answer to a request: status and document (text for a log)."""
        parts = urlsplit(target)
        self.requests.append((method, target, body))
        if self.failure is not None:
            return self.failure
        if parts.path.startswith(PREFIX):
            if not self.knows_pipelines:
                return 404, "404 page not found\n"
            namespace, _, name = parts.path.removeprefix(PREFIX).replace("/alignmentpipelines/", "/").partition("/")
            found = self.pipelines.get((namespace, name))
            if found is None:
                details = {"name": name, "group": "plumbline.dev", "kind": "alignmentpipelines"}
                return 404, {"kind": "Status", "message": f'alignmentpipelines "{name}" not found', "details": details}
            if method == "PATCH":
                found["spec"] = {**found["spec"], **body["spec"]}
            return 200, found
        if parts.path.startswith(RUNTIMES):
            offered = self.runtimes.get(parts.path.removeprefix(RUNTIMES))
            return (200, offered) if offered is not None else (403, {"kind": "Status", "message": "forbidden"})
        if parts.path.endswith("/log"):
            return 200, self.logs[parts.path.split("/")[-2]]
        if parts.path.endswith("/pods"):
            wanted = dict(item.split("=") for item in parse_qs(parts.query)["labelSelector"][0].split(","))
            items = [pod for pod in self.pods if wanted.items() <= pod["metadata"]["labels"].items()]
            return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}
        return 404, {"kind": "Status", "message": "not found"}


@contextmanager
def serve(folder: Path, *, namespace: str = "team-a") -> Iterator[tuple[ApiStub, Path]]:
    """A running stub and the kubeconfig whose current context points to it."""
    stub = ApiStub()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, answer = stub.answer(self.command, self.path, body)
            data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(answer, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PATCH = _handle

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}"
    kubeconfig = folder / "kubeconfig"
    contexts = [
        {"name": "main", "context": {"cluster": "c", "user": "u", "namespace": namespace}},
        {"name": "other", "context": {"cluster": "c", "user": "u", "namespace": "team-b"}},
    ]
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "main",
        "clusters": [{"name": "c", "cluster": {"server": stub.url}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": contexts,
    }
    kubeconfig.write_text(yaml.safe_dump(config))
    try:
        yield stub, kubeconfig
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
