"""Frozen weights in four bits while an adapter is trained (QLoRA, Dettmers et al. 2023), by way of bitsandbytes.

Only the copy in the accelerator's memory is quantised. The adapter is merged into the weights as they are stored, which
are better than what it was trained beside; `merge` reports what that does to the predictions.

The refusals are tested everywhere. What runs on CUDA has not been run on a GPU by the project's own tests yet.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from plumbline_api.errors import InputError
from plumbline_api.training import Freeze, Lora

from plumbline_trainer.models.dtypes import torch_dtype
from plumbline_trainer.models.selection import module_names, select

if TYPE_CHECKING:
    from plumbline_trainer.models.policy import Policy

PACKAGE = "bitsandbytes"


def refuse_without_package(field: str) -> None:
    """Say who has to act where the trainer image cannot quantise.

    Raises:
        InputError: if bitsandbytes is not installed.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise InputError(
            f"{field}: nf4 needs the Python package {PACKAGE}, which this trainer image does not have. The platform "
            f"team adds it to the image (pip install {PACKAGE}) and names that image in the runtime; "
            "or leave quantization out"
        )


def refuse_without_device(field: str, *, cuda: bool) -> None:
    """Say what to ask for where no CUDA device would be there.

    Raises:
        InputError: if `cuda` is false.
    """
    if not cuda:
        raise InputError(
            f"{field}: nf4 needs a CUDA device, and this stage has none. Set resources.gpusPerNode to 1 or more, "
            "on a runtime with NVIDIA GPUs; or leave quantization out"
        )


def layers_to_quantize(model: Any, lora: Lora, freeze: Freeze | None) -> list[str]:
    """Linear layers that hold their weights in 4 bits: all but the head and those that are trained whole.

    Raises:
        InputError: if `lora` or `freeze` names what the model does not have.
    """
    from torch import nn

    head, whole = model.get_output_embeddings(), select(module_names(model), lora, freeze).saved
    plain = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    return [name for name, module in plain if module is not head and name not in whole]


def quantize(policy: Policy, lora: Lora, freeze: Freeze | None) -> None:
    """Replace the linear layers of a policy by 4-bit ones, in place, where `lora` asks for it, and move it to CUDA.

    Where the policy lies in the machine's memory, the accelerator never holds more than one layer unquantised.

    Raises:
        InputError: if the package or the device is missing, or the model has no layers of the right kind.
    """
    if lora.quantization is None:
        return
    import torch

    assert lora.quantization == "nf4"
    field = "lora.quantization"
    refuse_without_package(field)
    refuse_without_device(field, cuda=torch.cuda.is_available())
    model: Any = policy.model
    linear = layers_to_quantize(model, lora, freeze)
    if not linear:
        raise InputError(f"{field}: the model has no plain linear layers to quantise; leave quantization out")
    replace_linear(model, linear, policy.precision)
    device = model.device if model.device.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
    model.to(device)
    policy.quantization = lora.quantization


def replace_linear(model: Any, names: Sequence[str], precision: str) -> None:
    """Put 4-bit layers in the place of linear ones, in place. They are quantised when the model is moved to a device.

    Args:
        model: That holds them.
        names: Of the layers.
        precision: Type in which they compute.
    """
    from torch import nn

    bitsandbytes: Any = importlib.import_module(PACKAGE)
    for name in names:
        old = model.get_submodule(name)
        # Nothing is allocated or drawn at random for weights that are replaced at once.
        new = bitsandbytes.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=torch_dtype(precision),
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        # Older releases quantise only what comes from the machine's memory.
        new.weight = bitsandbytes.nn.Params4bit(
            old.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
        )
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.data, requires_grad=False)
        new.train(old.training)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner) if owner else model, last, new)
