"""Types of weights in memory. torch is imported late: CPU jobs that only read headers start without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def torch_dtype(name: str) -> torch.dtype:
    """`float32` or `bfloat16` as torch's type."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def place_weights(model: Any, dtype: str, device: torch.device | str) -> None:
    """Move a model to a device and its weights to a type, in place.

    Buffers keep their type: rotary frequencies rounded to bfloat16 would be off by radians at the thousandth token.
    """
    import torch

    model.to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch_dtype(dtype))
