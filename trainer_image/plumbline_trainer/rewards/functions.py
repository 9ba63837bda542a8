"""Rewards by Python functions of the trainer image: found by name, identified by their source."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plumbline_api.fingerprint import digest_of

from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.rewards.interface import Candidate

if TYPE_CHECKING:
    from torch import Tensor

    from plumbline_trainer.engine.distributed import Ranks

RewardFunction = Callable[[list[list[dict[str, str]]], list[str], list[str | None]], Sequence[float]]
"""Prompts (each a list of messages with role and content), answers and references → one number per answer."""


class FunctionReward:
    """One function, called on rank 0 with all answers at once."""

    def __init__(self, name: str, function: RewardFunction) -> None:
        self._name, self._function = name, function

    def score(self, candidates: Sequence[Candidate], ranks: Ranks) -> Tensor:
        """[candidates] float32."""
        import torch

        found = torch.zeros(len(candidates), device=ranks.device)
        if ranks.is_main:
            found.copy_(torch.tensor(self._call(candidates)))
        ranks.share([found])
        return found.cpu()

    def _call(self, candidates: Sequence[Candidate]) -> list[float]:
        prompts, answers, references = columns_of(candidates)
        try:
            values = self._function(prompts, answers, references)
        except (InputError, TransientError):
            raise
        except Exception as error:
            raise InputError(
                f'the reward function "{self._name}" failed on {len(answers)} answers: '
                f"{type(error).__name__}: {error}. Mend the function"
            ) from error
        return numbers(values, len(answers), f'the reward function "{self._name}"', "gave")


def columns_of(candidates: Sequence[Candidate]) -> tuple[list[list[dict[str, str]]], list[str], list[str | None]]:
    """Prompts, answers and references, as functions and endpoints are given them."""
    return (
        [[message.to_chat() for message in candidate.prompt] for candidate in candidates],
        [candidate.answer for candidate in candidates],
        [candidate.reference for candidate in candidates],
    )


def numbers(values: Any, count: int, who: str, verb: str) -> list[float]:
    """What somebody else's code said, as finite numbers, one for each answer.

    Raises:
        InputError: naming who said what.
    """
    try:
        found = list(values)
    except TypeError:
        raise InputError(f"{who} {verb} {type(values).__name__}; a list of {count} numbers is needed") from None
    if len(found) != count:
        raise InputError(f"{who} {verb} {len(found)} scores for {count} answers")
    for place, value in enumerate(found):
        if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
            raise InputError(f"{who} {verb} {value!r} for answer {place} of {count}; a number is needed")
        if not math.isfinite(float(value)):
            raise InputError(f"{who} {verb} {float(value)} for answer {place} of {count}; a finite number is needed")
    return [float(value) for value in found]


def find_function(name: str) -> RewardFunction:
    """The function of a name, package.module:function; its module is imported.

    Raises:
        InputError: if there is none, or its module does not import.
    """
    module_name, _, attribute = name.rpartition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise InputError(
                f'reward function "{name}": there is no module {error.name}. Install it in the trainer image; for a '
                "local run put its folder on PYTHONPATH"
            ) from error
        raise InputError(f'reward function "{name}": {module_name} needs {error.name}, which is not there') from error
    except Exception as error:
        raise InputError(
            f'reward function "{name}": {module_name} does not import: {type(error).__name__}: {error}'
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        what = "is no function" if hasattr(module, attribute) else "is not in it"
        raise InputError(f'reward function "{name}": {attribute} {what} ({module_name})')
    return function  # type: ignore[no-any-return]


def source_digest(name: str) -> str:
    """SHA-256 over the Python source that a function may rest on: of its top-level package, else of its module.

    What it imports from elsewhere belongs to the image and does not count.

    Raises:
        InputError: if it has no source.
    """
    module_name = name.rpartition(":")[0]
    parts = module_name.split(".")
    for length in range(1, len(parts) + 1):
        spec = importlib.util.find_spec(".".join(parts[:length]))
        if spec is None:
            break
        if spec.origin is None or not spec.has_location:
            continue  # A namespace package holds no code of its own.
        origin = Path(spec.origin)
        files = sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
        base = origin.parent
        hashes = [[path.relative_to(base).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
        return digest_of(hashes)
    raise InputError(f'reward function "{name}": {module_name} has no source file that would say what it computes')


def open_function(name: str, digest: str | None) -> FunctionReward:
    """The function as a reward, compared with what preflight saw.

    Raises:
        InputError: if there is none; reason InputChanged, if its source is another one.
    """
    function = find_function(name)
    if digest is not None and source_digest(name) != digest:
        raise InputError(
            f'the source of the reward function "{name}" changed after preflight pinned it. Put the former source '
            "back, or retry from preflight to run on the new one",
            reason="InputChanged",
        )
    return FunctionReward(name, function)
