"""Load a base model and its tokenizer: safetensors folders and GGUF files, offline, without code from the folder."""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from plumbline_api.errors import InputError

from plumbline_trainer.models import folders
from plumbline_trainer.models.converted import keep, kept_folder
from plumbline_trainer.models.dtypes import torch_dtype
from plumbline_trainer.models.gguf import is_gguf, shared_reader
from plumbline_trainer.models.headers import BITS
from plumbline_trainer.models.tokenizer import Tokenizer, make_tokenizer

if TYPE_CHECKING:
    import torch

StorageDtype = Literal["float32", "bfloat16"]


_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RuntimeError,
    AssertionError,
    struct.error,
)
"""What readers of other people's files raise when the file is not what it should be."""


def storage_dtype_of(path: Path, declared: str = "auto") -> StorageDtype:
    """The type in which weights of this source are stored and every delta is rounded.

    `auto` is bfloat16 where every stored weight is bfloat16, else float32 (which holds float16 exactly).
    """
    if declared == "bfloat16":
        return "bfloat16"
    if declared == "float32" or not path.is_dir():
        return "float32"
    return "bfloat16" if folders.stored_types(path) == {"BF16"} else "float32"


def load_base(path: Path, dtype: str, device: torch.device | str = "cpu") -> tuple[Any, Tokenizer]:
    """Load a causal language model in evaluation mode, and its tokenizer.

    Args:
        path: a Hugging Face folder with safetensors, or a GGUF file (dequantised).
        dtype: `float32` or `bfloat16`.
        device: where the weights go.

    Raises:
        InputError: if the source is not a model that can be loaded safely.
    """
    if is_gguf(path) and (kept := keep(path, lambda folder: _convert(path, folder))) is not None:
        return load_base(kept, dtype, device)
    with _quiet(), _view(path, weights=True) as view:
        model = _load_gguf(path, dtype) if is_gguf(path) else _load_folder(view, dtype, path.name)
        tokenizer = _load_tokenizer(path, view, _model_ends(model))
    _adopt_tokens(model, tokenizer)
    model.eval()
    return model.to(device), tokenizer


def _convert(path: Path, folder: Path) -> None:
    """Write a GGUF file as a model folder in float32, which holds every value of it exactly."""
    from plumbline_trainer.models.saving import save_full

    with _quiet(), _view(path, weights=True):
        model = _load_gguf(path, "float32")
        tokenizer = _load_tokenizer(path, path, _model_ends(model))
    _adopt_tokens(model, tokenizer)
    save_full(model, tokenizer, folder, "float32")


def load_tokenizer(path: Path) -> Tokenizer:
    """Load only the tokenizer of a model folder or GGUF file.

    Raises:
        InputError: if it holds none that can be loaded safely.
    """
    if is_gguf(path) and (kept := kept_folder(path, [*folders.TOKENIZER_FILES, *folders.SETTINGS_FILES])) is not None:
        return load_tokenizer(kept)
    with _quiet(), _view(path, weights=False) as view:
        return _load_tokenizer(path, view, () if is_gguf(path) else folders.declared_ends(path))


def load_config(path: Path) -> Any:
    """The configuration of a model folder or GGUF file, cleaned; cheap, without weights."""
    from transformers import AutoConfig

    with _quiet(), _view(path, weights=False) as view:
        if is_gguf(path):
            try:
                config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
            except _UNREADABLE as error:
                raise InputError(f"{path.name} does not load: {_first_line(error)}. Copy it again") from error
        else:
            folders.read_settings(path, "config.json", required=True)
            config = _config(view, path.name)
    return _without_quantisation(config)


def load_skeleton(path: Path) -> Any:
    """A model of a folder or GGUF file without its weights: every module under its name, on the meta device.

    Raises:
        InputError: if the source is not a model that can be loaded safely.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(path)
    with _quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


@contextlib.contextmanager
def _view(path: Path, *, weights: bool) -> Iterator[Path]:
    """A clean view of a folder for as long as it is read; GGUF files are read in place."""
    if not path.exists():
        raise InputError(f"{path} is not there. Name a model folder or a .gguf file")
    if is_gguf(path):
        with shared_reader():
            yield path
        return
    if path.is_file():
        raise InputError(f"{path.name} is neither a GGUF file nor a model folder. Name the folder that holds the model")
    with tempfile.TemporaryDirectory(prefix="plumbline-model-") as made:
        view = Path(made) / "view"
        yield folders.model_view(path, view) if weights else folders.tokenizer_view(path, view)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Load offline and without progress bars: the log of a stage is plain lines."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield


def _config(view: Path, name: str) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = _read_config(view, name)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f'{name}/config.json: model_type "{config.model_type}" is not a causal language model')
    return config


def _read_config(view: Path, name: str) -> Any:
    from transformers import AutoConfig

    kind = folders.read_settings(view, "config.json", required=True).get("model_type")
    try:
        return AutoConfig.from_pretrained(str(view), local_files_only=True, trust_remote_code=False)
    except _UNREADABLE as error:
        raise InputError(
            f'{name}/config.json: model_type "{kind}" cannot be loaded: {_first_line(error)}. '
            "Only architectures that transformers has built in are run"
        ) from error


def _load_folder(view: Path, dtype: str, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return _load_weights(AutoModelForCausalLM, view, _config(view, name), dtype, name)


def load_classifier(path: Path, dtype: str, device: torch.device | str = "cpu") -> tuple[Any, Tokenizer]:
    """Load a sequence classifier with one label in evaluation mode, and its tokenizer.

    Raises:
        InputError: if the folder holds no such model that can be loaded safely.
    """
    from transformers import AutoModelForSequenceClassification

    if is_gguf(path):
        raise InputError(f"{path.name} is a GGUF file, which holds no classifier. Name a folder with safetensors")
    with _quiet(), _view(path, weights=True) as view:
        config = _classifier_config(view, path.name)
        model = _load_weights(AutoModelForSequenceClassification, view, config, dtype, path.name)
        tokenizer = _load_tokenizer(path, view, folders.declared_ends(path))
    model.eval()
    return model.to(device), tokenizer


def check_classifier(path: Path, header: Mapping[str, Any], name: str) -> None:
    """See that a folder is that of a sequence classifier with one label; arguments as of `check_weights`.

    Raises:
        InputError: if it is not, or its tokenizer does not load.
    """
    from transformers import AutoModelForSequenceClassification

    if is_gguf(path):
        raise InputError(f"{path.name} is a GGUF file, which holds no classifier. Name a folder with safetensors")
    with _quiet(), _view(path, weights=False) as view:
        config = _classifier_config(view, path.name)
        _load_tokenizer(path, view, folders.declared_ends(path))
    _check_fit(AutoModelForSequenceClassification, config, header, name)


def _classifier_config(view: Path, name: str) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config = _read_config(view, name)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(
            f'{name}/config.json: transformers has no sequence classifier for model_type "{config.model_type}"'
        )
    if config.num_labels != 1:
        raise InputError(
            f"{name}/config.json: the classifier has {config.num_labels} labels; a reward is one number. "
            "Name a model with num_labels 1, such as one that was trained to score answers"
        )
    return config


def _load_weights(auto: Any, view: Path, config: Any, dtype: str, name: str) -> Any:
    from safetensors import SafetensorError

    try:
        model, info = auto.from_pretrained(
            str(view),
            config=config,
            dtype=torch_dtype(dtype),
            attn_implementation=_attention(config),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with their names
        )
    except (*_UNREADABLE, SafetensorError) as error:
        if "allocate memory" in str(error):
            raise  # The files are sound; the worker says what to do about memory.
        raise InputError(f"{name}: the weights do not load: {_first_line(error)}. Copy the model again") from error
    _refuse_misfits(name, info)
    return model


def check_weights(path: Path, header: Mapping[str, Any], name: str) -> None:
    """See that weights are those that a model's configuration asks for, by names and shapes alone.

    Args:
        path: folder with the settings of the model.
        header: of all its safetensors files, name → {dtype, shape}.
        name: of the model, for messages.

    Raises:
        InputError: for weights that are missing, of another shape, or no floating-point numbers.
    """
    from transformers import AutoModelForCausalLM

    _check_fit(AutoModelForCausalLM, load_config(path), header, name)


def _check_fit(auto: Any, config: Any, header: Mapping[str, Any], name: str) -> None:
    """The loader itself judges, on tensors without content, so that it renames and joins them as it will later."""
    import torch

    for weight, entry in header.items():
        if weight.endswith(".weight") and entry["dtype"] not in BITS:
            raise InputError(
                f"{name}: {weight} is stored as {entry['dtype']}; weights are read as float64, float32, float16 or "
                "bfloat16. Name the unquantised model"
            )
    empty = {weight: torch.empty(entry["shape"], device="meta") for weight, entry in header.items()}
    with _quiet():
        with torch.device("meta"):
            model = type(auto.from_config(config))
        _, info = model.from_pretrained(
            None,
            config=config,
            state_dict=empty,
            device_map={"": "meta"},
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _refuse_misfits(name, info)


def _refuse_misfits(name: str, info: Mapping[str, Any]) -> None:
    """Refuse what the loader found missing or of another shape."""
    if mismatched := sorted(info["mismatched_keys"]):
        weight, here, wanted = mismatched[0]
        raise InputError(
            f"{name}: {len(mismatched)} weights have another shape than its config.json says ({weight}: "
            f"{list(here)}, not {list(wanted)}). The files do not belong together; copy the model again"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3])
        raise InputError(
            f"{name}: {len(missing)} weights that its config.json asks for are not there ({shown}). "
            "The files do not belong to this configuration; copy the model again"
        )


def _load_gguf(path: Path, dtype: str) -> Any:
    """Dequantise a GGUF file into a model that knows nothing of it, so that it can be trained and saved."""
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch_dtype(dtype),
            local_files_only=True,
            trust_remote_code=False,
        )
    except _UNREADABLE as error:
        raise InputError(f"{path.name} does not load: {_first_line(error)}. Copy it again, or name another") from error
    config = _without_quantisation(loaded.config)
    weights = loaded.state_dict()
    import torch

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch_dtype(dtype), attn_implementation=_attention(config)
        )
    buffers = dict(loaded.named_buffers())
    model.load_state_dict(weights, strict=True, assign=True)
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # Buffers that are computed, not stored, such as rotary frequencies.
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner).register_buffer(attribute, buffers[name], persistent=False)
    model.tie_weights()
    return model


def _attention(config: Any) -> str:
    """SDPA, except where the model caps its attention logits, which SDPA cannot do."""
    text = config.get_text_config()
    return "eager" if getattr(text, "attn_logit_softcapping", None) is not None else "sdpa"


def _without_quantisation(config: Any) -> Any:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    if hasattr(config, "_model_name_or_path"):  # The title of a GGUF file.
        del config._model_name_or_path
    return config


def _load_tokenizer(path: Path, view: Path, ends: tuple[int, ...]) -> Tokenizer:
    from transformers import AutoTokenizer

    where: dict[str, Any] = {"gguf_file": path.name} if is_gguf(path) else {}
    folder = path.parent if is_gguf(path) else view
    if not is_gguf(path) and not any((view / name).exists() for name in folders.VOCABULARIES):
        raise InputError(f"{path.name}: it has no tokenizer. A tokenizer.json must lie beside the weights")
    try:
        hf = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_fast=True, **where
        )
        return make_tokenizer(hf, declared_ends=ends)
    except (*_UNREADABLE, ImportError) as error:
        raise InputError(
            f"{path.name}: its tokenizer does not load: {_first_line(error)}. "
            "A tokenizer.json must lie beside the weights"
        ) from error


def _model_ends(model: Any) -> tuple[int, ...]:
    declared = getattr(model.generation_config, "eos_token_id", None)
    values = declared if isinstance(declared, list) else [declared]
    return tuple(int(value) for value in values if value is not None)


def _adopt_tokens(model: Any, tokenizer: Tokenizer) -> None:
    """Make the model's own generation settings say what the tokenizer says, and nothing else."""
    from transformers import GenerationConfig

    ends = list(tokenizer.end_tokens)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_id, eos_token_id=ends if len(ends) > 1 else ends[0], pad_token_id=tokenizer.pad_id
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
