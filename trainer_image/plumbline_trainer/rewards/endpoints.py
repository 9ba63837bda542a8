"""Rewards by HTTP services that the runtime offers: POST {prompts, answers, references} gives {scores}."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import requests
import torch
from plumbline_api.quantities import parse_duration
from plumbline_api.runtime import RewardEndpoint
from plumbline_api.stagerun import endpoint_token_env
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.rewards.functions import columns_of, numbers
from plumbline_trainer.rewards.interface import Candidate

AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which trying again may help."""
RETRIES = 3
BACKOFF_SECONDS = 0.5
"""Before the second retry; it doubles with every further one."""
RESPONSE_BYTES_MAX = 16 * 2**20
READ_BYTES = 64 * 1024
UNAVAILABLE = "EndpointUnavailable"


class EndpointReward:
    """One service, asked by rank 0 batch by batch."""

    def __init__(
        self,
        endpoint: RewardEndpoint,
        *,
        environment: Mapping[str, str] | None = None,
        backoff_seconds: float = BACKOFF_SECONDS,
    ) -> None:
        """Look for the token; nothing is asked yet.

        Raises:
            InputError: if the endpoint needs a token and there is none.
        """
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
            total=RETRIES,
            backoff_factor=backoff_seconds,
            status_forcelist=AGAIN,
            allowed_methods=None,
            redirect=0,
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry))

    def score(self, candidates: Sequence[Candidate], ranks: Ranks) -> Tensor:
        """[candidates] float32."""
        found = torch.zeros(len(candidates), device=ranks.device)
        if ranks.is_main:
            scores: list[float] = []
            for start in range(0, len(candidates), self._endpoint.batch_size):
                scores += self._ask(candidates[start : start + self._endpoint.batch_size])
            found.copy_(torch.tensor(scores))
        ranks.share([found])
        return found.cpu()

    def _ask(self, candidates: Sequence[Candidate]) -> list[float]:
        prompts, answers, references = columns_of(candidates)
        body = {"prompts": prompts, "answers": answers, "references": references}
        deadline = time.monotonic() + self._timeout * (RETRIES + 1)
        try:
            response = self._session.post(
                self._endpoint.url, json=body, timeout=self._timeout, allow_redirects=False, stream=True
            )
            with response:
                if response.status_code in AGAIN:
                    raise TransientError(
                        f"{self._who} answered {response.status_code} {RETRIES + 1} times", reason=UNAVAILABLE
                    )
                content = self._read(response, min(deadline, time.monotonic() + self._timeout))
        except (requests.ConnectionError, requests.Timeout, HTTPError) as error:
            slow = isinstance(error, requests.Timeout) or "timed out" in str(error)
            seen = f"did not answer within {self._endpoint.timeout}" if slow else f"cannot be reached: {_cause(error)}"
            raise TransientError(f"{self._who} {seen}, {RETRIES + 1} times", reason=UNAVAILABLE) from error
        except requests.RequestException as error:
            raise InputError(f"{self._who} cannot be asked: {error}") from error
        if response.status_code != 200:
            said = content[:200].decode(errors="replace").strip()
            seen = f"{response.status_code}: {said}" if said else str(response.status_code)
            raise InputError(f"{self._who} answered {seen}. {self._remedy(response.status_code)}")
        return numbers(self._scores(content), len(answers), self._who, "sent")

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


def _cause(error: BaseException) -> str:
    """The innermost reason, without the objects that wrap it."""
    reason = error
    while (inner := getattr(reason, "reason", None) or (reason.args[0] if reason.args else None)) is not None:
        if not isinstance(inner, BaseException):
            break
        reason = inner
    return str(reason).rpartition(": ")[2][:200]
