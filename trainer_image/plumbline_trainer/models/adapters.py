"""Low-rank adapters (Hu et al. 2021) by way of peft: attach, initialise, switch off, save and read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plumbline_api.errors import InputError
from plumbline_api.training import Lora
from torch import Tensor, nn

from plumbline_trainer.models.merging import Adapter, Delta

ADAPTER_NAME = "default"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


def linear_modules(model: Any) -> dict[str, nn.Module]:
    """Every linear layer but the output head, by name: `nn.Linear` and GPT-2's `Conv1D`."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def target_modules(model: Any, targets: list[str] | None) -> list[str]:
    """Full names of the modules that an adapter changes.

    Raises:
        InputError: if a target matches nothing that can be adapted.
    """
    linear = linear_modules(model)
    if targets is None:
        if not linear:
            raise InputError("lora: the model has no linear layers to adapt. Train all weights: leave lora out")
        return sorted(linear)
    chosen: set[str] = set()
    for target in targets:
        matched = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not matched:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            head = any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules())
            why = "is not a linear layer of the blocks (the output head and embeddings stay as they are)"
            raise InputError(
                f'lora.targets: "{target}" {why if head else "matches no layer of the model"}. There are: {known}'
            )
        chosen |= matched
    return sorted(chosen)


def attach_lora(model: Any, lora: Lora, seed: int) -> Any:
    """Freeze a model and put a fresh adapter on its linear layers, in place; returns the same model.

    The modules are replaced by peft's, whose trainable factors are float32 whatever the base is. B is zero and A is
    uniform in ±1/√in, drawn for every module from (seed, name), so that it is the same on every machine.

    Raises:
        InputError: if `lora.targets` matches nothing.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    names = target_modules(model, lora.targets)
    modules = dict(model.named_modules())
    model.requires_grad_(False)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=_alpha(lora),
        lora_dropout=lora.dropout,
        target_modules=names,
        bias="none",
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in names),
        task_type="CAUSAL_LM",
    )
    peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    for name, layer in _lora_layers(model):
        a, b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        a.data = initial_factor(seed, name, a.shape[0], a.shape[1]).to(a.device)
        b.data = torch.zeros(b.shape, dtype=torch.float32, device=b.device)
        a.requires_grad_(True)
        b.requires_grad_(True)
    return model


def initial_factor(seed: int, module: str, rank: int, width: int) -> Tensor:
    """The first A of a module: (rank, width), uniform in ±1/√width, a pure function of its arguments.

    Built from raw bits, because the streams of the libraries' distributions may change between versions.
    """
    key = int.from_bytes(hashlib.sha256(f"lora/{seed}/{module}".encode()).digest()[:16], "big")
    raw = np.random.Philox(key=key).random_raw(rank * width)
    unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return torch.from_numpy((unit * np.float32(1.0 / math.sqrt(width))).reshape(rank, width))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimizer moves, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """While this is open, the model computes without its adapter: as the policy that training started from."""
    layers = [layer for _, layer in _lora_layers(model)]
    kept = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True  # Unlike enable_adapters, this leaves requires_grad alone.
    try:
        yield
    finally:
        for layer, disabled in zip(layers, kept, strict=True):
            layer._disable_adapters = disabled


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained factors under peft's names, as float32 on the CPU."""
    state: dict[str, Tensor] = {}
    for name, layer in _lora_layers(model):
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part)[ADAPTER_NAME].weight
            state[f"{_PEFT_PREFIX}{name}.{part}.weight"] = weight.detach().to("cpu", torch.float32).contiguous().clone()
    return state


def adapter_of(model: nn.Module, lora: Lora) -> Adapter:
    """The attached adapter as deltas."""
    from transformers.pytorch_utils import Conv1D

    scale = _alpha(lora) / lora.rank
    deltas: dict[str, Delta] = {}
    for name, layer in _lora_layers(model):
        a, b = (getattr(layer, part)[ADAPTER_NAME].weight for part in ("lora_A", "lora_B"))
        transposed = isinstance(layer.get_base_layer(), Conv1D)
        deltas[name] = Delta(a.detach().cpu().float(), b.detach().cpu().float(), scale, transposed)
    return Adapter(deltas, lora.rank, _alpha(lora), tuple(sorted(deltas)))


def save_adapter(model: nn.Module, lora: Lora, folder: Path) -> None:
    """Write the attached adapter in peft's layout: `adapter_config.json` and `adapter_model.safetensors`.

    The files name no path of this machine, and equal weights give equal bytes.
    """
    from safetensors.torch import save_file

    adapter = adapter_of(model, lora)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(model), str(folder / ADAPTER_WEIGHTS), metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": _plain(_alpha(lora)),
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": any(delta.transposed for delta in adapter.deltas.values()),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _described(model, adapter.targets),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True), encoding="utf-8")


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter in peft's layout.

    Raises:
        InputError: if it is damaged or of a kind that is not merged here.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        state = load_file(str(folder / ADAPTER_WEIGHTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the adapter in {folder.name} cannot be read: {error}", reason="InputMissing") from error
    unusual = [
        key for key in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unusual:
        raise InputError(
            f"the adapter in {folder.name} is not a plain LoRA adapter ({', '.join(unusual) or 'type or bias'})"
        )
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    deltas: dict[str, Delta] = {}
    for key in sorted(state):
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(_PEFT_PREFIX).removesuffix(".lora_A.weight")
        other = key.replace(".lora_A.", ".lora_B.")
        if other not in state:
            raise InputError(f"the adapter in {folder.name} holds {key} but not {other}", reason="InputMissing")
        transposed = bool(config.get("fan_in_fan_out", False))
        deltas[name] = Delta(state[key].float(), state[other].float(), alpha / rank, transposed)
    if 2 * len(deltas) != len(state):
        raise InputError(f"the adapter in {folder.name} holds weights that are no LoRA factors")
    return Adapter(deltas, rank, alpha, tuple(sorted(deltas)))


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put saved factors (of `adapter_state`) back into the attached adapter."""
    expected = adapter_state(model)
    if set(expected) != set(state):
        raise InputError("a saved adapter does not fit the model: other layers were adapted when it was written")
    with torch.no_grad():
        for name, layer in _lora_layers(model):
            for part in ("lora_A", "lora_B"):
                getattr(layer, part)[ADAPTER_NAME].weight.copy_(state[f"{_PEFT_PREFIX}{name}.{part}.weight"])


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in sorted(model.named_modules(), key=lambda item: item[0]):
        if isinstance(module, LoraLayer):
            yield name, module


def _described(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """The suffixes of the adapted modules where they mean exactly those, as serving engines expect; else full names."""
    suffixes = {name.rpartition(".")[2] for name in names}
    plain = [name for name, _ in model.named_modules() if ".lora_" not in name and not name.endswith(".base_layer")]
    meant = {name for name in plain if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes) if meant == set(names) else sorted(names)


def _alpha(lora: Lora) -> float:
    return 2.0 * lora.rank if lora.alpha is None else lora.alpha


def _plain(value: float) -> float | int:
    """Whole numbers without a point: some readers of adapter_config.json expect an integer."""
    return int(value) if value == int(value) else value
