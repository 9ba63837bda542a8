"""Model folders from outside: what is in them is data, never code.

A folder is not given to transformers as it is. A clean view of it is made first: only files of known names and formats,
and settings without the keys that would load code, kernels or adapters from somewhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from plumbline_api.errors import InputError

from plumbline_trainer.models.headers import read_header

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Of these a tokenizer has at least one."""
TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
SETTINGS_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
_SHARD = re.compile(r"^[\w.-]+\.safetensors$")
_CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate", "use_kernels", "kernel_config"})
"""Keys that point at code. They are dropped: an architecture that transformers knows does not need them."""
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def model_view(source: Path, into: Path) -> Path:
    """Make a clean view of a model folder (links to its weights, cleaned settings) and return it.

    Raises:
        InputError: if the folder holds no usable model, or one that only its own code can load.
    """
    config = clean_config(read_settings(source, "config.json", required=True), source)
    shards = weight_files(source)
    into.mkdir(parents=True, exist_ok=True)
    _write(into / "config.json", config)
    for shard in shards:
        safetensors_header(shard)
        (into / shard.name).symlink_to(shard.resolve())
    if (source / WEIGHTS_INDEX).is_file() and not (source / WEIGHTS).is_file():
        (into / WEIGHTS_INDEX).symlink_to((source / WEIGHTS_INDEX).resolve())
    _link_tokenizer(source, into)
    return into


def tokenizer_view(source: Path, into: Path) -> Path:
    """Make a clean view of a folder that holds at least a tokenizer, and return it."""
    into.mkdir(parents=True, exist_ok=True)
    config = read_settings(source, "config.json", required=False)
    if config:
        _write(into / "config.json", clean_config(config, source))
    _link_tokenizer(source, into)
    return into


def read_settings(folder: Path, name: str, *, required: bool) -> dict[str, Any]:
    """A JSON file of a model folder; empty where it is not there and not required."""
    path = folder / name
    if not path.is_file():
        if not required:
            return {}
        if (folder / "adapter_config.json").is_file():
            raise InputError(
                f"{folder.name} holds an adapter, not a model: adapter_config.json is there, {name} is not. "
                "Merge the adapter into its base model first, or name the base model"
            )
        raise InputError(f"{folder.name} is not a model folder: it has no {name}. Name the folder that holds it")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{folder.name}/{name} is not JSON: {error}. Copy the model again") from error
    if not isinstance(document, dict):
        raise InputError(f"{folder.name}/{name} must hold one JSON object")
    return document


def clean_config(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """The settings without keys that load something from elsewhere.

    Raises:
        InputError: for settings that ask for code of their own to be trusted, and for quantised weights.
    """
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            raise InputError(
                f"{source.name}/config.json: {key} is set: the weights are quantised, and an adapter cannot be merged "
                "into those exactly. Name the unquantised model"
            )
    return {key: _clean(value, key, source) for key, value in config.items() if not _is_code_key(key)}


def declared_ends(folder: Path) -> tuple[int, ...]:
    """End tokens that generation_config.json or config.json declare."""
    ends: list[int] = []
    for name in ("generation_config.json", "config.json"):
        declared = read_settings(folder, name, required=False).get("eos_token_id")
        values = declared if isinstance(declared, list) else [declared]
        ends += [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    return tuple(dict.fromkeys(ends))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights.

    Raises:
        InputError: if there are none, or the index names files that are not there.
    """
    present = {path.name for path in folder.iterdir() if path.is_file()}
    return [folder / name for name in weight_names(folder, present)]


def weight_names(folder: Path, present: Collection[str]) -> list[str]:
    """Names of the files that hold the weights of a model.

    Args:
        folder: holds at least its settings.
        present: names of the files that the model has, here or where it lies.

    Raises:
        InputError: if there are none, or the index names files that are not there.
    """
    if WEIGHTS in present:
        return [WEIGHTS]
    if WEIGHTS_INDEX in present:
        names = read_settings(folder, WEIGHTS_INDEX, required=True).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError(f"{folder.name}/{WEIGHTS_INDEX} has no weight_map. Copy the model again")
        files = []
        for name in sorted(set(map(str, names.values()))):
            if not _SHARD.match(name):
                raise InputError(
                    f'{folder.name}/{WEIGHTS_INDEX} names "{name}", which is not a file name in the folder'
                )
            if name not in present:
                raise InputError(f"{folder.name}/{name} is missing, although {WEIGHTS_INDEX} names it. Copy it as well")
            files.append(name)
        return files
    pickles = sorted(name for pattern in _PICKLES for name in present if fnmatch(name, pattern))
    if pickles:
        raise InputError(
            f"{folder.name} holds its weights only as {', '.join(pickles[:3])}, a format that can run code when it is "
            "loaded. Convert it once where you trust it: load it with transformers and call save_pretrained, which "
            f"writes {WEIGHTS}"
        )
    raise InputError(f"{folder.name} holds no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX} is there")


def stored_types(folder: Path) -> set[str]:
    """Types of the stored floating-point weights as safetensors names them, such as F32 and BF16.

    Raises:
        InputError: if a file is not a safetensors file.
    """
    found: set[str] = set()
    for path in weight_files(folder):
        found |= {str(entry["dtype"]) for entry in safetensors_header(path).values() if "dtype" in entry}
    return {name for name in found if name.startswith(("F", "BF"))}


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: name → {dtype, shape, data_offsets}."""
    with path.open("rb") as file:

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        return read_header(path.name, path.stat().st_size, read)


def _link_tokenizer(source: Path, into: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            (into / name).symlink_to((source / name).resolve())
    settings = read_settings(source, "tokenizer_config.json", required=False)
    if settings:
        cleaned = {key: _clean(value, key, source) for key, value in settings.items() if not _is_code_key(key)}
        _write(into / "tokenizer_config.json", cleaned)


def _is_code_key(key: str) -> bool:
    return key in _CODE_KEYS or key.endswith(("_implementation", "_implementation_internal"))


def _clean(value: Any, key: str, source: Path) -> Any:
    if key == "trust_remote_code" and value:
        raise InputError(
            f"{source.name} asks to trust code of its own (trust_remote_code). Code from model folders is never run; "
            "name a model of an architecture that transformers has built in"
        )
    if isinstance(value, dict):
        return {name: _clean(inner, name, source) for name, inner in value.items() if not _is_code_key(name)}
    if isinstance(value, list):
        return [_clean(inner, key, source) for inner in value]
    return value


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")
