"""Write full weights in the layout of Hugging Face, so that transformers and everything after it reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plumbline_trainer.models.dtypes import torch_dtype
from plumbline_trainer.models.merging import stored_weights
from plumbline_trainer.models.tokenizer import Tokenizer

SHARD_BYTES = 20 * 1024**3
"""Largest weight file. Most models are one file; larger ones get an index."""


@torch.no_grad()
def save_full(
    model: Any, tokenizer: Tokenizer, folder: Path, dtype: str, state: dict[str, Tensor] | None = None
) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files.

    Args:
        model: the model, with no adapter attached.
        tokenizer: the policy's tokenizer; its template goes with it.
        folder: where to write; made if need be.
        dtype: storage type, `float32` or `bfloat16`. Equal weights give equal bytes.
        state: weights by name to write instead of the model's own, such as gathered ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = torch_dtype(dtype)
    weights = stored_weights(model) if state is None else state
    cast = {name: _stored(weight, target) for name, weight in weights.items()}
    kept = model.config.dtype
    model.config.dtype = target
    try:
        model.save_pretrained(str(folder), state_dict=cast, max_shard_size=SHARD_BYTES)
    finally:
        model.config.dtype = kept
    _write_config(folder, model.config, dtype)
    tokenizer.hf.save_pretrained(str(folder))
    _forget_paths(folder / "tokenizer_config.json")


def _stored(weight: Tensor, dtype: torch.dtype) -> Tensor:
    weight = weight.detach().to("cpu")
    return (weight.to(dtype) if weight.is_floating_point() else weight).contiguous()


def _write_config(folder: Path, config: Any, dtype: str) -> None:
    """Say the stored type and whether the head is tied, as the weights are."""
    path = folder / "config.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["dtype"] = dtype
    document.setdefault("tie_word_embeddings", bool(config.get_text_config().tie_word_embeddings))
    document.pop("_name_or_path", None)
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _forget_paths(path: Path) -> None:
    """A tokenizer remembers the folder that it was loaded from."""
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
        document.pop("name_or_path", None)
        document.pop("local_files_only", None)
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
