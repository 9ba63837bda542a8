"""Types of weights in memory. torch is imported late: CPU jobs that only read headers start without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from plumbline_api.online import SampledStage
from plumbline_api.training import TunedStage

if TYPE_CHECKING:
    import torch


def torch_dtype(name: str) -> torch.dtype:
    """`float32` or `bfloat16` as torch's type."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def widens(precision: str, *, device: str) -> bool:
    """Whether frozen linear layers may hold their weights as they are stored: on a CPU alone, where it was measured."""
    return device == "cpu" and precision == "float32"


def holds_stored(parameters: TunedStage, *, device: str) -> bool:
    """Whether a stage's frozen linear layers hold their weights as they are stored while others learn in float32.

    Sampling has products with dozens of rows, beside which widening takes longest, and merges adapters into copies of
    float32 weights; `ewc` takes gradients of frozen weights.
    """
    return (
        parameters.lora is not None
        and widens(parameters.training.precision, device=device)
        and not isinstance(parameters, SampledStage)
        and getattr(parameters, "ewc", None) is None
    )


def place_weights(model: Any, dtype: str, device: torch.device | str, *, stored: bool = False) -> None:
    """Move a model to a device and its weights to a type, in place.

    Buffers keep their type: rotary frequencies rounded to bfloat16 would be off by radians at the thousandth token.

    Args:
        model: To move.
        dtype: `float32` or `bfloat16`.
        device: Where it goes.
        stored: Whether linear layers hold their weights as they are now; they compute in the type all the same.
    """
    import torch

    from plumbline_trainer.models.stored_linear import hold_as_stored

    model.to(device)
    kept = {id(weight) for weight in hold_as_stored(model)} if stored else set()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and id(parameter) not in kept:
                parameter.data = parameter.data.to(torch_dtype(dtype))
