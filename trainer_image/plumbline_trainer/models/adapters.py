"""Low-rank adapters (Hu et al. 2021) by way of peft: attach, initialise, switch off, save and read.

Modules that are trained whole beside an adapter are trained in place, as float32; what they started from stays beside
them, so that the model can compute as it did at the start.
"""

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
from plumbline_api.training import Freeze, Lora
from torch import Tensor, nn

from plumbline_trainer.models.merging import START_PREFIX, Adapter, Delta, fold_sum, starts_of
from plumbline_trainer.models.selection import is_named, module_names, select

ADAPTER_NAME = "default"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


def attach_lora(model: Any, lora: Lora, seed: int, freeze: Freeze | None = None) -> Any:
    """Freeze a model and put a fresh adapter on its linear layers, in place; returns the same model.

    The modules are replaced by peft's, whose trainable factors are float32 whatever the base is. B is zero and A is
    uniform in ±1/√in, drawn for every module from (seed, name), so that it is the same on every machine.

    Raises:
        InputError: if `lora` or `freeze` names what the model does not have.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    chosen = select(module_names(model), lora, freeze)
    modules = dict(model.named_modules())
    model.requires_grad_(False)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=_alpha(lora),
        lora_dropout=lora.dropout,
        target_modules=list(chosen.adapted),
        bias="none",
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in chosen.adapted),
        task_type="CAUSAL_LM",
        use_rslora=lora.rs_lora,
        use_dora=lora.dora,
    )
    peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    for name, layer in adapter_layers(model):
        a, b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        a.data = initial_factor(seed, name, a.shape[0], a.shape[1]).to(a.device)
        b.data = torch.zeros(b.shape, dtype=torch.float32, device=b.device)
        a.requires_grad_(True)
        b.requires_grad_(True)
        if lora.dora:
            magnitude = layer.lora_magnitude_vector[ADAPTER_NAME].weight
            magnitude.data = _row_lengths(layer, name).to(magnitude.device)
            magnitude.requires_grad_(True)
    for name, module in modules.items():  # In the model's order, so that a tied weight keeps its first name.
        if name in chosen.saved:
            _train_whole(module)
    if chosen.saved:
        _widen_vectors(model)
    return model


def _widen_vectors(model: nn.Module) -> None:
    """Hold norms as float32, which changes no value: a residual stream that starts at float32 embeddings is float32,
    and layer norms refuse weights that are narrower than their input."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and all(parameter.ndim == 1 for parameter in own):
            for parameter in own:
                parameter.data = parameter.data.float()


def _row_lengths(layer: Any, name: str) -> Tensor:
    """‖W‖ of every output of an adapted layer, float32: where DoRA's magnitudes start."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    base = layer.get_base_layer()
    weight = dequantize_module_weight(base).detach().cpu().double()
    lengths = fold_sum((weight.T if isinstance(base, Conv1D) else weight).square()).sqrt().float()
    if not bool((lengths > 0).all()):
        raise InputError(
            f"lora.dora: {name} has outputs whose weights are all zero, and a length of zero has no direction. "
            "Leave the layer out of lora.targets, or leave dora out"
        )
    return lengths


def _train_whole(module: nn.Module) -> None:
    """Make a module's weights trainable as float32; a weight shared with another module stays shared."""
    for part, parameter in list(module.named_parameters(recurse=False)):
        if not parameter.requires_grad:  # The other of two tied modules did it already.
            start = parameter.detach()
            parameter.data = start.to(torch.float32, copy=True)  # The storage may be another model's, too.
            parameter.requires_grad_(True)
            module.register_buffer(f"{START_PREFIX}{part}", start, persistent=False)


def initial_factor(seed: int, module: str, rank: int, width: int) -> Tensor:
    """The first A of a module: (rank, width), uniform in ±1/√width, a pure function of its arguments.

    Built from raw bits, because the streams of the libraries' distributions may change between versions.
    """
    key = int.from_bytes(hashlib.sha256(f"lora/{seed}/{module}".encode()).digest()[:16], "big")
    raw = np.random.Philox(key=key).random_raw(rank * width)
    unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return torch.from_numpy((unit * np.float32(1.0 / math.sqrt(width))).reshape(rank, width))


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """While this is open, the model computes without its adapter: as the policy that training started from.

    Modules trained whole compute with the weights that they started from.
    """
    layers = [layer for _, layer in adapter_layers(model)]
    kept = [layer._disable_adapters for layer in layers]
    starts = starts_of(model)
    trained = {name: model.get_parameter(name).data for name in starts}
    for layer in layers:
        layer._disable_adapters = True  # Unlike enable_adapters, this leaves requires_grad alone.
    for name, start in starts.items():
        model.get_parameter(name).data = start.to(trained[name].dtype)
    try:
        yield
    finally:
        for layer, disabled in zip(layers, kept, strict=True):
            layer._disable_adapters = disabled
        for name, weight in trained.items():
            model.get_parameter(name).data = weight


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What was trained under peft's names, as float32 on the CPU."""
    state = {f"{_PEFT_PREFIX}{name}": _kept(weight) for name, weight in _factors(model)}
    return state | {f"{_PEFT_PREFIX}{name}": _kept(weight) for name, weight in _saved_weights(model).items()}


def adapter_of(model: nn.Module, lora: Lora) -> Adapter:
    """The attached adapter as deltas."""
    from transformers.pytorch_utils import Conv1D

    deltas: dict[str, Delta] = {}
    for name, layer in adapter_layers(model):
        a, b = (_kept(getattr(layer, part)[ADAPTER_NAME].weight) for part in ("lora_A", "lora_B"))
        transposed = isinstance(layer.get_base_layer(), Conv1D)
        magnitude = _kept(layer.lora_magnitude_vector[ADAPTER_NAME].weight) if lora.dora else None
        deltas[name] = Delta(a, b, _scale(_alpha(lora), lora.rank, lora.rs_lora), transposed, magnitude)
    saved = {name: _kept(weight) for name, weight in _saved_weights(model).items()}
    return Adapter(deltas, lora.rank, _alpha(lora), tuple(sorted(deltas)), saved)


def _factors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Factors and magnitudes by the names of peft's files."""
    for name, layer in adapter_layers(model):
        yield f"{name}.lora_A.weight", layer.lora_A[ADAPTER_NAME].weight
        yield f"{name}.lora_B.weight", layer.lora_B[ADAPTER_NAME].weight
        if ADAPTER_NAME in layer.lora_magnitude_vector:
            yield f"{name}.lora_magnitude_vector", layer.lora_magnitude_vector[ADAPTER_NAME].weight


def _saved_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that are trained whole, by every name they have: tied ones under both."""
    trained = {id(model.get_parameter(name)) for name in starts_of(model)}
    everywhere = model.named_parameters(remove_duplicate=False)
    return {name: weight for name, weight in everywhere if id(weight) in trained}


def _kept(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", torch.float32).contiguous().clone()


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
        "use_rslora": lora.rs_lora,
        "use_dora": lora.dora,
        "init_lora_weights": True,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapter.saved}) or None,
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
    unusual = [key for key in ("rank_pattern", "alpha_pattern", "trainable_token_indices") if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unusual:
        raise InputError(
            f"the adapter in {folder.name} is not a plain LoRA adapter ({', '.join(unusual) or 'type or bias'})"
        )
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    scale = _scale(alpha, rank, bool(config.get("use_rslora")))
    transposed = bool(config.get("fan_in_fan_out", False))
    weights = {key.removeprefix(_PEFT_PREFIX): weight.float() for key, weight in state.items()}
    parts = ("lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if config.get("use_dora") else []))
    deltas: dict[str, Delta] = {}
    for name in sorted(key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")):
        found = [weights.pop(f"{name}.{part}", None) for part in parts]
        a, b, magnitude = (*found, None)[:3]
        if a is None or b is None or (len(found) == 3 and magnitude is None):
            raise InputError(f"the adapter in {folder.name} holds only a part of {name}", reason="InputMissing")
        deltas[name] = Delta(a, b, scale, transposed, magnitude)
    whole = tuple(config.get("modules_to_save") or ())
    odd = [key for key in weights if not any(is_named(key.rpartition(".")[0], module) for module in whole)]
    if odd:
        raise InputError(f"the adapter in {folder.name} holds weights that its configuration does not name: {odd[0]}")
    return Adapter(deltas, rank, alpha, tuple(sorted(deltas)), weights)


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put saved weights (of `adapter_state`) back into the attached adapter."""
    if set(adapter_state(model)) != set(state):
        raise InputError("a saved adapter does not fit the model: other layers were adapted when it was written")
    with torch.no_grad():
        for name, weight in (*_factors(model), *_saved_weights(model).items()):
            weight.copy_(state[f"{_PEFT_PREFIX}{name}"])


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that carry an adapter, by name and in the order of names."""
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


def _scale(alpha: float, rank: int, stabilised: bool) -> float:
    return alpha / math.sqrt(rank) if stabilised else alpha / rank


def _alpha(lora: Lora) -> float:
    return 2.0 * lora.rank if lora.alpha is None else lora.alpha


def _plain(value: float) -> float | int:
    """Whole numbers without a point: some readers of adapter_config.json expect an integer."""
    return int(value) if value == int(value) else value
