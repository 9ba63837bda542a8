"""Models that are merged with one another: set aside as files, so that one is in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plumbline_api.errors import InputError

from plumbline_trainer.models.merging import stored_weights

if TYPE_CHECKING:
    from plumbline_api.stagerun import StageInput

    from plumbline_trainer.models.policy import Policy


@dataclass(frozen=True)
class Part:
    """One of the models."""

    role: str
    """Such as `models.0` or `base`."""
    name: str
    file: Path
    """Its weights in their storage type, adapters merged."""
    shapes: dict[str, tuple[int, ...]]
    tokenizer_digest: str
    storage_dtype: str
    origin: dict[str, Any]
    """Where it comes from, for the manifest of what is made of it."""

    @property
    def field(self) -> str:
        """Its field in the manifest, for people."""
        kind, _, number = self.role.partition(".")
        return f"merge.{kind}[{number}]" if number else f"merge.{kind}"


def set_aside(policy: Policy, item: StageInput, file: Path) -> Part:
    """Write a policy's weights to a file, each once."""
    from safetensors.torch import save_file

    weights = {name: weight.detach().contiguous() for name, weight in stored_weights(policy.model).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, str(file))
    origin = {"name": item.name, "type": item.stage_type, "fingerprint": item.fingerprint, "uri": item.uri}
    return Part(
        role=item.role,
        name=item.name,
        file=file,
        shapes={name: tuple(weight.shape) for name, weight in weights.items()},
        tokenizer_digest=policy.tokenizer.digest,
        storage_dtype=policy.storage_dtype,
        origin={key: value for key, value in origin.items() if value is not None},
    )


def check_fit(first: Part, other: Part) -> None:
    """Refuse models that do not stand for the same function of their weights.

    Raises:
        InputError: naming both and what differs.
    """
    both = f'{first.field} ("{first.name}") and {other.field} ("{other.name}")'
    remedy = "Merge only models that were trained from the same base"
    if first.tokenizer_digest != other.tokenizer_digest:
        raise InputError(f"{both} have different tokenizers, chat templates or end tokens. {remedy}")
    if missing := sorted(set(first.shapes) ^ set(other.shapes)):
        raise InputError(f'{both} do not have the same weights: only one of them has "{missing[0]}". {remedy}')
    for name, shape in first.shapes.items():
        if shape != other.shapes[name]:
            one, two = ("×".join(map(str, part.shapes[name])) for part in (first, other))
            raise InputError(f'{both} differ in shape: "{name}" is {one} in one and {two} in the other. {remedy}')
