"""How deep in a model its parameters lie."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from plumbline_trainer.errors import InputError


def layer_stack(model: PreTrainedModel) -> str | None:
    """Name of the list of a model's layers; None where it has none."""
    count = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    stacks = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return min(stacks, key=len) if stacks and count else None


def layer_depths(model: PreTrainedModel) -> dict[str, int]:
    """How many layers lie between each parameter and the top one, by the parameter's name.

    0 is the top layer and what comes after it; what comes before the first layer (embeddings, also where the head is
    tied to them) is one deeper than that.

    Raises:
        InputError: if the model has no list of layers.
    """
    found = layer_stack(model)
    if found is None:
        raise InputError(
            f"training.layerDecay: {type(model).__name__} has no list of layers to tell their depth from; leave it out"
        )
    stack, count = f"{found}.", len(list(model.get_submodule(found).children()))
    depths: dict[str, int] = {}
    depth = count
    for name, _ in model.named_parameters():
        # In the order of the forward pass: embeddings, layers, the last norm, the head.
        if name.startswith(stack):
            depths[name] = count - 1 - int(name.removeprefix(stack).split(".")[0])
            depth = 0
        else:
            depths[name] = depth
    return depths
