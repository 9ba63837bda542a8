"""Rewards by HTTP services that the runtime offers: POST {prompts, answers, references} gives {scores}."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

import requests
from plumbline_api.quantities import parse_duration
from plumbline_api.runtime import RewardEndpoint
from plumbline_api.stagerun import endpoint_token_env
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from plumbline_trainer.context import StopSignal
from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.rewards.functions import columns_of, numbers
from plumbline_trainer.rewards.interface import Candidate
from plumbline_trainer.rewards.mainrank import on_main_rank

if TYPE_CHECKING:  # Preflight asks too, without torch.
    from torch import Tensor

    from plumbline_trainer.engine.distributed import Ranks

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which trying again may help."""
RETRIES = 3
BACKOFF_SECONDS = 0.5
"""Before the second retry; it doubles with every further one."""
RESPONSE_BYTES_MAX = 16 * 2**20
READ_BYTES = 64 * 1024
LOOK_SECONDS = 0.2
"""Between two looks, while an answer is waited for, whether the stage has to stop."""
UNAVAILABLE = "EndpointUnavailable"


class EndpointReward:
    """One service, asked by rank 0 batch by batch."""

    def __init__(
        self,
        endpoint: RewardEndpoint,
        *,
        environment: Mapping[str, str] | None = None,
        backoff_seconds: float | None = None,
        stop: StopSignal | None = None,
        retries: int = RETRIES,
    ) -> None:
        """Look for the token; nothing is asked yet.

        Args:
            endpoint: As the runtime offers it.
            environment: That holds the token; absent: that of the process.
            backoff_seconds: Before the second retry; absent: half a second.
            stop: Ends the wait for an answer.
            retries: After the first try, where trying again may help.

        Raises:
            InputError: if the endpoint needs a token and there is none.
        """
        self._stop, self._tries = stop or StopSignal(), retries + 1
        self._endpoint, self._timeout = endpoint, parse_duration(endpoint.timeout)
        self._who = f'the reward endpoint "{endpoint.name}" ({endpoint.url})'
        variable = endpoint_token_env(endpoint.name)
        token = (os.environ if environment is None else environment).get(variable, "").strip()
        if endpoint.secret_name is not None and not token:
            raise InputError(
                f"{self._who} needs a token and {variable} is not set. In a cluster it comes from the key token of the "
                f"Secret {endpoint.secret_name}; for a local run set the variable"
            )
        self._session = requests.Session()
        self._session.auth = _Bearer(token)
        retry = Retry(
            total=retries,
            backoff_factor=BACKOFF_SECONDS if backoff_seconds is None else backoff_seconds,
            status_forcelist=AGAIN,
            allowed_methods=None,
            redirect=0,
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry))

    def score(self, candidates: Sequence[Candidate], ranks: Ranks) -> Tensor:
        """[candidates] float32."""
        size = self._endpoint.batch_size
        batches = [candidates[start : start + size] for start in range(0, len(candidates), size)]
        return on_main_rank(ranks, len(candidates), lambda: [score for batch in batches for score in self.ask(batch)])

    def ask(self, candidates: Sequence[Candidate]) -> list[float]:
        """The scores of a batch, unless the stage has to stop: retries may take longer than a pod has to end.

        Raises:
            InputError: if the answer is not one, or none can come.
            TransientError: if none came, or the stage was told to stop.
        """
        answer = _in_background(lambda: self._ask(candidates))
        while not wait([answer], timeout=LOOK_SECONDS).done:
            if self._stop.requested:
                raise TransientError(f"{self._who} was not waited for: the stage was told to stop", reason=UNAVAILABLE)
        return answer.result()

    def _ask(self, candidates: Sequence[Candidate]) -> list[float]:
        prompts, answers, references = columns_of(candidates)
        body: Any = {"prompts": prompts, "answers": answers, "references": references}
        deadline = time.monotonic() + self._timeout * self._tries
        try:
            response = self._session.post(
                self._endpoint.url, json=body, timeout=self._timeout, allow_redirects=False, stream=True
            )
            with response:
                if response.status_code in AGAIN:
                    raise TransientError(
                        f"{self._who} answered {response.status_code} {self._often}", reason=UNAVAILABLE
                    )
                content = self._read(response, min(deadline, time.monotonic() + self._timeout))
        except (requests.ConnectionError, requests.Timeout, HTTPError) as error:
            slow = isinstance(error, requests.Timeout) or "timed out" in str(error)
            seen = f"did not answer within {self._endpoint.timeout}" if slow else f"cannot be reached: {_cause(error)}"
            raise TransientError(f"{self._who} {seen}, {self._often}", reason=UNAVAILABLE) from error
        except requests.RequestException as error:
            raise InputError(f"{self._who} cannot be asked: {error}") from error
        if response.status_code != 200:
            said = content[:200].decode(errors="replace").strip()
            seen = f"{response.status_code}: {said}" if said else str(response.status_code)
            raise InputError(f"{self._who} answered {seen}. {self._remedy(response.status_code)}")
        return numbers(self._scores(content), len(answers), self._who, "sent")

    @property
    def _often(self) -> str:
        return f"{self._tries} times" if self._tries > 1 else "once"

    def _read(self, response: requests.Response, deadline: float) -> bytes:
        """The body, piece by piece: one that trickles in would outlast any time-out between two pieces."""
        content = b""
        while piece := response.raw.read1(READ_BYTES, decode_content=True):
            content += piece
            if len(content) > RESPONSE_BYTES_MAX:
                raise InputError(f"{self._who} sent more than {RESPONSE_BYTES_MAX // 2**20} MiB for one batch")
            if time.monotonic() > deadline:
                raise TransientError(
                    f"{self._who} did not finish its answer within {self._endpoint.timeout}", reason=UNAVAILABLE
                )
        return content

    def _scores(self, content: bytes) -> Any:
        try:
            document = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self._who} sent no JSON: {content[:80].decode(errors='replace')!r}") from error
        if not isinstance(document, dict) or not isinstance(document.get("scores"), list):
            raise InputError(f'{self._who} sent no list of scores; it must send {{"scores": [number, …]}}')
        return document["scores"]

    def _remedy(self, status: int) -> str:
        if status in (401, 403):
            secret = self._endpoint.secret_name
            return "Its spec.rewardEndpoints names no secretName" if secret is None else f"Check the token in {secret}"
        if 300 <= status < 400:
            return "Redirects are not followed; name the final URL in spec.rewardEndpoints"
        return "Ask the owners of the runtime"


class _Bearer(requests.auth.AuthBase):
    """Sends the token. Set even without one, so that no password file of the machine is looked at."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _in_background(work: Callable[[], list[float]]) -> Future[list[float]]:
    """Work in a thread that nobody has to wait for, not even the end of the process."""
    found: Future[list[float]] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, name="reward-endpoint", daemon=True).start()
    return found


def _cause(error: BaseException) -> str:
    """The innermost reason, without the objects that wrap it."""
    reason = error
    while (inner := getattr(reason, "reason", None) or (reason.args[0] if reason.args else None)) is not None:
        if not isinstance(inner, BaseException):
            break
        reason = inner
    return str(reason).rpartition(": ")[2][:200]
