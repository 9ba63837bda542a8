"""A second model on the same frozen weights: reward models and critics beside the policy, in the memory of one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from plumbline_trainer.models.adapters import adapter_layers
from plumbline_trainer.models.dtypes import torch_dtype
from plumbline_trainer.models.merging import START_PREFIX, starts_of

if TYPE_CHECKING:
    from plumbline_trainer.models.policy import Policy


def is_frozen(policy: Policy) -> bool:
    """Whether the weights of a policy stay as they were loaded: an adapter is on them, and they are not quantised.

    Modules that are trained whole beside the adapter keep what they started from, so that they do not matter.
    """
    own = _adapter_parameters(policy.model)
    if policy.quantization is not None or not own:
        return False
    starts = starts_of(policy.model)
    whole = {id(policy.model.get_parameter(name)) for name in starts}
    return all(
        not parameter.requires_grad or id(parameter) in own or id(parameter) in whole
        for parameter in policy.model.parameters()
    )


def shared_backbone(policy: Policy) -> Any:
    """A module tree of its own on the weights that a policy was loaded with, without its adapter, in evaluation mode.

    The tree computes what a second copy of the policy would, bit for bit, and takes no memory for weights: its
    parameters are frozen and lie in the storage of the policy's. What is attached to it or set on it leaves the policy
    alone.

    Args:
        policy: `is_frozen` must hold: a policy under full training would change the tree with every step.
    """
    assert is_frozen(policy)
    model, dtype = policy.model, torch_dtype(policy.precision)
    starts = {id(model.get_parameter(name)): start for name, start in starts_of(model).items()}
    own = _adapter_parameters(model)
    # Whatever is in the memo is not copied.
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        if id(parameter) in own:
            memo[id(parameter)] = parameter  # goes with its layer
            continue
        weight: Tensor = starts.get(id(parameter), parameter.detach())
        # Norms are widened beside modules that are trained whole; the narrow values are the same.
        narrow = weight.to(dtype) if weight.is_floating_point() else weight
        memo[id(parameter)] = nn.Parameter(narrow, requires_grad=False)
    twin = copy.deepcopy(model, memo)
    for name, layer in list(adapter_layers(twin)):
        owner, _, last = name.rpartition(".")
        setattr(twin.get_submodule(owner) if owner else twin, last, layer.get_base_layer())
    for module in twin.modules():
        for name in [name for name in module._buffers if name.startswith(START_PREFIX)]:
            delattr(module, name)
    if hasattr(twin, "peft_config"):
        del twin.peft_config
    twin.eval()
    return twin


def _adapter_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that belong to adapters."""
    found: set[int] = set()
    for _, layer in adapter_layers(model):
        base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
        found |= {id(parameter) for parameter in layer.parameters()} - base
    return found
