"""vLLM as it is spoken to: a server that behaves, one that does not, and a process that stands for it."""

from __future__ import annotations

import json
import stat
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
import torch
from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.models.adapters import ADAPTER_CONFIG, adapters_disabled
from plumbline_trainer.models.loading import load_base
from plumbline_trainer.rollout.interface import Prompt, Sampled
from plumbline_trainer.rollout.vllm import BASE, Sidecar, VllmClient, VllmRollout, VllmServer, find_executable
from support import adapted, tiny

END = 1
PROMPTS = [Prompt(f"row-{number}", [7, 8, 9, 10 + number]) for number in range(5)]


class Served(BaseHTTPRequestHandler):
    """Answers n times with the prompt's last token, then ends; told to misbehave by `mode`."""

    mode = "well"
    asked: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        if self.mode == "hang":
            time.sleep(3)
            return
        if self.mode in ("500", "400"):
            self._say(int(self.mode), json.dumps({"error": {"message": "no such thing"}}))
            return
        if self.path != "/v1/completions":
            self._say(200, "Success: done")
            return
        last = body["prompt"][-1]
        choices: list[dict[str, Any]] = [
            {"index": index, "token_ids": [last] * (index + 1) + [END], "finish_reason": "stop", "text": ""}
            for index in range(body["n"])
        ]
        choices[0] = {"index": 0, "token_ids": [last] * body["max_tokens"], "finish_reason": "length", "text": ""}
        if self.mode == "few":
            choices.pop()
        if self.mode == "old":
            del choices[0]["token_ids"]
        if self.mode == "endless":
            choices[-1]["token_ids"].pop()
        self._say(200, json.dumps({"choices": choices[::-1]}))

    def _say(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    """A server in a thread: its address and its handler."""
    handler = type("Handler", (Served,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


class Ends:
    end_tokens = (END,)


def rollout(url, **settings) -> VllmRollout:
    client = VllmClient(url, timeout_seconds=settings.pop("timeout_seconds", 20.0))
    return VllmRollout(lambda: (client, "policy-3"), Ends(), max_new_tokens=6, temperature=0.7, **settings)


def test_token_ids_go_out_and_come_back(served):
    url, handler = served
    shares: list[float] = []
    found = rollout(url).sample(PROMPTS, answers=3, seed=4, at_step=shares.append)
    for prompt, answers in zip(PROMPTS, found, strict=True):
        last = prompt.ids[-1]
        assert answers == [
            Sampled([last] * 6, False),
            Sampled([last, last, END], True),
            Sampled([last, last, last, END], True),
        ]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    requests = [body for path, body in handler.asked if path == "/v1/completions"]
    assert sorted(body["prompt"] for body in requests) == [prompt.ids for prompt in PROMPTS]
    for body in requests:
        expected = {"model": "policy-3", "n": 3, "max_tokens": 6, "temperature": 0.7, "stop_token_ids": [END]}
        plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        assert {key: body[key] for key in expected | plain} == expected | plain
    seeds = {tuple(body["prompt"]): body["seed"] for body in requests}
    assert len(set(seeds.values())) == len(PROMPTS)
    assert all(seed % 256 == 0 for seed in seeds.values())  # its answers count on from there


@pytest.mark.parametrize(
    ("mode", "kind", "said"),
    [
        ("few", InputError, 'gave 2 answers of 3 to row "row-'),
        ("old", InputError, "without 'token_ids'; version 0.10.2 or later"),
        ("endless", InputError, "do not fit"),
        ("400", InputError, "/v1/completions refuses with status 400: .*no such thing"),
        ("500", TransientError, "/v1/completions fails with status 500: .*no such thing"),
        ("hang", TransientError, "does not answer: .*timed out"),
    ],
)
def test_a_server_that_misbehaves_is_named(served, mode, kind, said):
    url, handler = served
    handler.mode = mode
    with pytest.raises(kind, match=said) as raised:
        rollout(url, timeout_seconds=0.5).sample(PROMPTS, answers=3, seed=0)
    assert url in str(raised.value)


def test_nobody_there():
    with pytest.raises(TransientError, match="does not answer"):
        rollout("http://127.0.0.1:9").sample(PROMPTS, answers=1, seed=0)
    with pytest.raises(InputError, match="http://host:port"):
        VllmClient("file:///etc/passwd")


def test_the_caller_may_stop(served):
    url, _ = served

    def stop(share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollout(url).sample(PROMPTS, answers=2, seed=0, at_step=stop)


def test_it_is_refused_where_it_cannot_run(tmp_path):
    with pytest.raises(InputError, match=r"rlhf.rollout.engine: vllm needs a CUDA device.*huggingface"):
        find_executable("rlhf.rollout.engine", {"PATH": str(tmp_path)}, cuda=False)
    with pytest.raises(InputError, match=r'no executable "vllm".*PLUMBLINE_VLLM'):
        find_executable("rlhf.rollout.engine", {"PATH": str(tmp_path)}, cuda=True)
    made = tmp_path / "my-vllm"
    made.write_text("#!/bin/sh\n")
    made.chmod(made.stat().st_mode | stat.S_IXUSR)
    assert find_executable("x", {"PLUMBLINE_VLLM": str(made)}, cuda=True) == str(made)


STAND_IN = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
arguments = sys.argv[1:]
named = dict(zip(arguments[2:], arguments[3:]))
if "broken" in os.environ:
    sys.exit("no kernel image is available for execution on the device")
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with open(os.environ["SAID"], "a") as said:
            said.write(self.path + " " + body + chr(10))
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
with open(os.environ["SAID"], "a") as said:
    said.write("serve " + json.dumps(arguments) + chr(10))
HTTPServer(("127.0.0.1", int(named["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path):
    """An executable that takes vLLM's arguments and notes what it is told."""
    made = tmp_path / "vllm"
    made.write_text(STAND_IN.format(python=sys.executable))
    made.chmod(0o755)
    return str(made), {"SAID": str(tmp_path / "said"), "PATH": "/usr/bin:/bin"}, tmp_path / "said"


def told(said) -> list[tuple[str, Any]]:
    lines = [line.partition(" ") for line in said.read_text().splitlines()]
    return [(what, json.loads(rest)) for what, _, rest in lines]


def sidecar(tmp_path, stand_in, kind):
    executable, environment, said = stand_in
    model, tokenizer = load_base(tiny.save_model(tmp_path / "tiny", "llama", seed=4), "float32")
    lora = adapted.lora_of(kind)
    adapted.attach_and_move(model, lora, 3)
    made = Sidecar(executable, model, tokenizer, lora, tmp_path, dtype="float32", environment=environment)
    return made, model, said


def test_the_base_is_loaded_once_and_adapters_follow(tmp_path, stand_in):
    made, model, said = sidecar(tmp_path, stand_in, "rsLora")
    try:
        names = [made.sync()[1] for _ in range(3)]
    finally:
        made.close()
    assert names == ["policy-1", "policy-2", "policy-3"]
    served, *rest = told(said)
    assert served[1][:2] == ["serve", str(tmp_path / "model")]
    assert served[1][served[1].index("--max-lora-rank") + 1] == "4"
    assert served[1][served[1].index("--served-model-name") + 1] == BASE
    assert [(what, body["lora_name"]) for what, body in rest] == [
        ("/v1/load_lora_adapter", "policy-1"),
        ("/v1/load_lora_adapter", "policy-2"),
        ("/v1/unload_lora_adapter", "policy-1"),
        ("/v1/load_lora_adapter", "policy-3"),
        ("/v1/unload_lora_adapter", "policy-2"),
    ]
    assert [folder.name for folder in (tmp_path / "adapters").iterdir()] == ["policy-3"]
    assert (tmp_path / "adapters" / "policy-3" / ADAPTER_CONFIG).is_file()
    base, _ = load_base(tmp_path / "model", "float32")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), adapters_disabled(model):
        torch.testing.assert_close(base(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["dora", "saved", "everything"])
def test_what_is_no_plain_adapter_is_served_whole(tmp_path, stand_in, kind):
    made, model, said = sidecar(tmp_path, stand_in, kind)
    try:
        names = [made.sync()[1] for _ in range(2)]
    finally:
        made.close()
    assert names == [BASE, BASE]
    assert [what for what, _ in told(said)] == ["serve", "serve"]
    whole, _ = load_base(tmp_path / "model", "float32")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-5)


def test_a_process_that_ends_says_why(tmp_path, stand_in):
    executable, environment, _ = stand_in
    with pytest.raises(InputError, match="ended with code 1 before it served the policy: no kernel image"):
        VllmServer(executable, tmp_path, tmp_path / "log", environment={**environment, "broken": "yes"}, rank=None)


def test_a_process_that_never_answers_is_ended(tmp_path):
    made = tmp_path / "vllm"
    made.write_text("#!/bin/sh\nexec sleep 600\n")
    made.chmod(0o755)
    with pytest.raises(TransientError, match="did not serve the policy in time"):
        VllmServer(str(made), tmp_path, tmp_path / "log", environment={"PATH": "/bin"}, rank=None, start_seconds=0.2)
