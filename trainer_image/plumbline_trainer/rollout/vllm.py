"""Rollouts by vLLM, experimental: a process of its own with its own packages, spoken to in token ids over HTTP.

The server loads the policy's base once and takes the adapter anew before every rollout. What it cannot take as an
adapter (DoRA, modules that are trained whole, training without adapter) is merged, written out whole and loaded by a
server started anew, which takes minutes. Its random numbers are its own: seeded by seed and row, but no function of
them that we could state. Log-probabilities are the trainer's to compute.

What talks to the server is tested against one that behaves as it should and as it should not; it has not been run on
a GPU by the project's own tests yet.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.models.adapters import adapter_of, save_adapter
from plumbline_trainer.models.dtypes import torch_dtype
from plumbline_trainer.models.merging import merged_weights, starts_of
from plumbline_trainer.models.saving import save_full
from plumbline_trainer.models.tokenizer import Tokenizer
from plumbline_trainer.rollout.interface import Prompt, Sampled
from plumbline_trainer.rollout.sharing import share_answers

if TYPE_CHECKING:
    from plumbline_api.training import Lora

    from plumbline_trainer.engine.distributed import Ranks

EXECUTABLE_ENV = "PLUMBLINE_VLLM"
"""Names the executable where it is not `vllm` on the PATH."""
BASE = "policy"
REQUESTS = 32
"""Prompts that are asked at once; the server batches what it has."""
ANSWER_SECONDS = 600.0
START_SECONDS = 1800.0
LOOK_SECONDS = 0.5
"""How often the caller hears of progress while the server is busy."""


def find_executable(field: str, environment: Mapping[str, str], *, cuda: bool) -> str:
    """Where vLLM is.

    Raises:
        InputError: if it is not installed, or there is no CUDA device for it.
    """
    if not cuda:
        raise InputError(
            f"{field}: vllm needs a CUDA device, and this stage has none. Set resources.gpusPerNode to 1 or more, on a "
            "runtime with NVIDIA GPUs; or set it to huggingface"
        )
    named = environment.get(EXECUTABLE_ENV, "vllm")
    if (found := shutil.which(named, path=environment.get("PATH"))) is None:
        raise InputError(
            f'{field}: this trainer image has no executable "{named}". The platform team installs vLLM in an '
            f"environment of its own and names its executable in {EXECUTABLE_ENV}; or set {field} to huggingface"
        )
    return found


class VllmServer:
    """A vLLM process that serves one model folder on this machine."""

    def __init__(
        self,
        executable: str,
        folder: Path,
        log: Path,
        *,
        environment: Mapping[str, str],
        rank: int | None,
        memory_share: float = 0.4,
        start_seconds: float = START_SECONDS,
    ) -> None:
        """Start it and wait until it answers.

        Args:
            executable: of vLLM.
            folder: model in Hugging Face layout.
            log: where its output goes.
            environment: of the process.
            rank: of the adapters that it is to take; None: it takes none.
            memory_share: of the device's memory; training needs the rest.
            start_seconds: how long loading may take.

        Raises:
            InputError: if it ends before it answers.
            TransientError: if it does not answer in time.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [executable, "serve", str(folder), "--served-model-name", BASE, "--host", "127.0.0.1"]
        command += ["--port", str(port), "--gpu-memory-utilization", str(memory_share)]
        if rank is not None:
            command += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env={**environment, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait(time.monotonic() + start_seconds)
        except BaseException:
            self.close()
            raise

    def _wait(self, until: float) -> None:
        while True:
            if (code := self._process.poll()) is not None:
                lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
                raise InputError(f"vLLM ended with code {code} before it served the policy: {' | '.join(lines)[-600:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):  # noqa: S310 - this machine's own port
                    return
            except OSError as error:
                if time.monotonic() > until:
                    raise TransientError(
                        f"vLLM did not serve the policy in time; its output is in {self._log}"
                    ) from error
                time.sleep(LOOK_SECONDS)

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class VllmClient:
    """Asks a server for token ids."""

    def __init__(self, url: str, *, timeout_seconds: float = ANSWER_SECONDS) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f'the address "{url}" of vLLM is no HTTP address; write http://host:port')
        self.url = url.rstrip("/")
        self.timeout_seconds = timeout_seconds

    def load_adapter(self, name: str, folder: Path) -> None:
        """Serve an adapter under a name.

        Raises:
            InputError: if the server does not take it.
            TransientError: if it does not answer.
        """
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter."""
        self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def complete(self, model: str, prompt: Prompt, answers: int, **sampling: Any) -> list[Sampled]:
        """Answers to one prompt.

        Raises:
            InputError: if the server refuses, or answers other than it was asked.
            TransientError: if it fails or does not answer in time.
        """
        request = {
            "model": model,
            "prompt": prompt.ids,
            "n": answers,
            "return_token_ids": True,
            # Named, because a model folder may declare others as its defaults.
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            **sampling,
        }
        choices = self._post("/v1/completions", request).get("choices")
        if not isinstance(choices, list) or len(choices) != answers:
            count = len(choices) if isinstance(choices, list) else 0
            raise InputError(f'vLLM at {self.url} gave {count} answers of {answers} to row "{prompt.row_id}"')
        try:
            ordered = sorted(choices, key=lambda choice: int(choice["index"]))
            return [self._sampled(choice, prompt, sampling["stop_token_ids"]) for choice in ordered]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"vLLM at {self.url} gave an answer without {error}; version 0.10.2 or later is needed"
            ) from error

    def _sampled(self, choice: Mapping[str, Any], prompt: Prompt, ends: Sequence[int]) -> Sampled:
        ids = [int(token) for token in choice["token_ids"]]
        finished = choice["finish_reason"] == "stop"
        if not ids or finished != (ids[-1] in ends):
            raise InputError(
                f'vLLM at {self.url} ended an answer to row "{prompt.row_id}" with token '
                f'{ids[-1] if ids else "none"} and the reason "{choice["finish_reason"]}", which do not fit'
            )
        return Sampled(ids, finished)

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=data, headers=headers)  # noqa: S310 - checked in __init__
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:  # noqa: S310
                text = response.read()
        except urllib.error.HTTPError as error:
            said = error.read(600).decode("utf-8", "replace")
            if error.code < 500:
                raise InputError(f"vLLM at {self.url}{path} refuses with status {error.code}: {said}") from error
            raise TransientError(f"vLLM at {self.url}{path} fails with status {error.code}: {said}") from error
        except (OSError, TimeoutError) as error:  # a hang is a TimeoutError
            raise TransientError(f"vLLM at {self.url}{path} does not answer: {error}") from error
        try:
            document = json.loads(text)
        except ValueError:
            document = None  # the adapters' endpoints answer in words
        return document if isinstance(document, dict) else {}


class Sidecar:
    """A server of ours and what it was told of the policy. What it loads lies in a scratch folder."""

    def __init__(
        self,
        executable: str,
        model: Any,
        tokenizer: Tokenizer,
        lora: Lora | None,
        scratch: Path,
        *,
        dtype: str,
        environment: Mapping[str, str],
    ) -> None:
        """Take a policy; the server starts with the first `sync`.

        Args:
            executable: of vLLM.
            model: the policy in training.
            tokenizer: its tokenizer.
            lora: how it is adapted; None: its weights are trained.
            scratch: folder for models, adapters and the server's output.
            dtype: type in which weights are written for the server.
            environment: of its process.
        """
        self.executable, self.environment, self.dtype = executable, environment, dtype
        self.model, self.tokenizer, self.lora, self.scratch = model, tokenizer, lora, scratch
        # A server takes low-rank factors; magnitudes and whole modules it does not take beside them.
        self.takes_adapter = lora is not None and not lora.dora and not starts_of(model)
        self._server: VllmServer | None = None
        self._version = 0

    def sync(self) -> tuple[VllmClient, str]:
        """Serve the policy as it is now; gives the client and the name to ask for.

        Raises:
            InputError: if the server ends, or does not take the policy.
            TransientError: if it does not answer.
        """
        self._version += 1
        if self.lora is None or not self.takes_adapter:
            self.close()
            return VllmClient(self._start(None).url), BASE
        server = self._server or self._start(self.lora.rank)
        client, name = VllmClient(server.url), f"{BASE}-{self._version}"
        folder = self.scratch / "adapters" / name
        save_adapter(self.model, self.lora, folder)
        client.load_adapter(name, folder)
        if self._version > 1:
            before = f"{BASE}-{self._version - 1}"
            client.unload_adapter(before)
            shutil.rmtree(self.scratch / "adapters" / before)
        return client, name

    def _start(self, rank: int | None) -> VllmServer:
        folder, state = self.scratch / "model", None
        shutil.rmtree(folder, ignore_errors=True)
        self.scratch.mkdir(parents=True, exist_ok=True)
        if self.lora is not None and not self.takes_adapter:
            adapter = adapter_of(self.model, self.lora)
            state = dict(merged_weights(self.model, adapter, torch_dtype(self.dtype)))
        save_full(self.model, self.tokenizer, folder, self.dtype, state)
        log = self.scratch / "vllm.log"
        self._server = VllmServer(self.executable, folder, log, environment=self.environment, rank=rank)
        return self._server

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.close()
            self._server = None


class VllmRollout:
    """Samples from a server that is told of the policy before every rollout; rank 0 asks for all ranks."""

    def __init__(
        self,
        sync: Callable[[], tuple[VllmClient, str]],
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        ranks: Ranks | None = None,
    ) -> None:
        """Take a server.

        Args:
            sync: makes the server serve the policy as it is now; gives the client and the name it has there.
            tokenizer: the policy's; any of the end tokens ends an answer.
            max_new_tokens: longest answer.
            temperature: tokens are drawn from softmax(logits/temperature).
            ranks: processes that get all answers.
        """
        self.sync = sync
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.ranks = ranks

    def describe(self) -> str:
        """How answers are sampled, for the log."""
        return "vLLM (experimental)"

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        answers: int,
        seed: int,
        at_step: Callable[[float], None] | None = None,
    ) -> list[list[Sampled]]:
        """Answer every prompt several times; see `RolloutEngine.sample`. Draws are the server's own."""
        found: dict[int, list[Sampled]] = {}
        if self.ranks is None or self.ranks.is_main:
            found = self._ask(prompts, answers, seed, at_step or (lambda share: None))
        if self.ranks is not None and self.ranks.size > 1:
            return share_answers(found, len(prompts), answers, self.max_new_tokens, self.ranks)
        return [found[index] for index in range(len(prompts))]

    def _ask(
        self, prompts: Sequence[Prompt], answers: int, seed: int, at_step: Callable[[float], None]
    ) -> dict[int, list[Sampled]]:
        client, model = self.sync()
        pool = ThreadPoolExecutor(REQUESTS)
        try:
            asked: dict[Future[list[Sampled]], int] = {
                pool.submit(
                    client.complete,
                    model,
                    prompt,
                    answers,
                    max_tokens=self.max_new_tokens,
                    temperature=self.temperature,
                    seed=_seed_of(seed, prompt.row_id),
                    stop_token_ids=list(self.tokenizer.end_tokens),
                ): index
                for index, prompt in enumerate(prompts)
            }
            found: dict[int, list[Sampled]] = {}
            left = set(asked)
            while left:
                done, left = wait(left, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED)
                found.update((asked[future], future.result()) for future in done)
                at_step(len(found) / len(prompts))
            return found
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _seed_of(seed: int, row_id: str) -> int:
    """The server numbers answers by adding to a request's seed, so that requests' seeds lie far apart."""
    return int.from_bytes(hashlib.sha256(f"vllm/{seed}/{row_id}".encode()).digest()[:6], "big") << 8
