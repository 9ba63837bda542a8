"""What preflight knows about a model without its weights in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plumbline_api.fingerprint import digest_of
from plumbline_api.record import ExternalInput

from plumbline_trainer.data.sources import bundled_model, fetch_model, model_objects
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.folders import weight_names
from plumbline_trainer.models.headers import BITS, read_header
from plumbline_trainer.planning.memory import Sizes, sizes_of
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.manifests import read_json
from plumbline_trainer.storage.objects import PARALLEL_OBJECTS

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext
    from plumbline_trainer.models.tokenizer import Tokenizer

FACTS_VERSION = 2
CACHE_FOLDER = "findings"
EMBEDDINGS = ("model.embed_tokens.weight", "wte.weight")


@dataclass(frozen=True, slots=True)
class ModelFacts(Sizes):
    """Sizes of a model."""

    architecture: str
    parameters: int
    vocabulary: int
    context_length: int | None
    storage_dtype: str
    has_chat_template: bool


def model_facts(context: StageContext, item: ExternalInput, digest: str) -> ModelFacts:
    """The sizes of a model; read once per content.

    Raises:
        InputError: if it is no model that can be trained here.
    """
    key = digest_of([digest, item.settings, FACTS_VERSION])
    place = uris.join(context.namespace_root, f"{CACHE_FOLDER}/model-{key[:32]}.json")
    known = read_json(context.store, place)
    if isinstance(known, dict):
        try:
            return ModelFacts(**known)
        except TypeError:
            pass
    with reading(item):
        facts = _read(context, item, digest)
    context.store.put_bytes(place, json.dumps(asdict(facts), indent=1).encode())
    return facts


def local_tokenizer(context: StageContext, item: ExternalInput, digest: str) -> Tokenizer:
    """The tokenizer of a model."""
    return _load_tokenizer(small_files(context, item, digest))


@lru_cache(maxsize=2)
def _load_tokenizer(path: Path) -> Tokenizer:
    from plumbline_trainer.models.loading import load_tokenizer

    return load_tokenizer(path)


def reading(item: ExternalInput) -> AbstractContextManager[None]:
    """While a GGUF file is read, it is parsed once for everything that is wanted of it."""
    if not item.uri.startswith("bundled://") and not item.uri.endswith(".gguf"):
        return nullcontext()
    from plumbline_trainer.models.gguf import shared_reader

    return shared_reader()


def small_files(context: StageContext, item: ExternalInput, digest: str) -> Path:
    """Configuration and tokenizer of a model on this machine; of a mounted or GGUF model, all of it."""
    if item.uri.startswith("bundled://"):
        return bundled_model(item.uri)
    if item.uri.startswith("hf://") or item.uri.endswith(".gguf") or uris.parse(item.uri).scheme == "file":
        return fetch_model(context, item.uri, digest)
    folder = context.scratch / "models" / f"small-{digest[:16]}"
    for info in model_objects(context.store, item.uri):
        name = uris.basename(info.uri)
        if not name.endswith(".safetensors") and not (folder / name).exists():
            context.store.get_file(info.uri, folder / name)
    return folder


def _read(context: StageContext, item: ExternalInput, digest: str) -> ModelFacts:
    from plumbline_trainer.models.loading import check_weights, load_config

    path = small_files(context, item, digest)
    config = load_config(path)
    text = config.get_text_config()
    tokenizer = local_tokenizer(context, item, digest)
    if len(tokenizer.hf) > int(text.vocab_size):
        raise InputError(
            f"{item.uri}: its tokenizer has {len(tokenizer.hf):,} tokens, its config.json allows {text.vocab_size:,}. "
            "The files do not belong together; copy the model again"
        )
    width = getattr(text, "word_embed_proj_dim", None) or text.hidden_size
    if path.is_file():
        parameters, dtype = _gguf_parameters(path), "float32"
    else:
        header = weights_header(context, item, path)
        _check_embedding(item, header, int(text.vocab_size), int(width))
        check_weights(path, header, item.uri)
        types = {entry["dtype"] for entry in header.values()} & set(BITS)
        parameters = sum(math.prod(entry["shape"]) for entry in header.values() if entry["dtype"] in BITS)
        dtype = "bfloat16" if types == {"BF16"} else "float32"
    declared = str(item.settings.get("storageDtype", "auto"))
    return ModelFacts(
        **asdict(sizes_of(text)),
        architecture=str(config.model_type),
        parameters=parameters,
        vocabulary=int(text.vocab_size),
        context_length=int(text.max_position_embeddings) if hasattr(text, "max_position_embeddings") else None,
        storage_dtype=dtype if declared == "auto" else declared,
        has_chat_template=tokenizer.template is not None,
    )


def _check_embedding(item: ExternalInput, header: Mapping[str, Any], vocabulary: int, hidden: int) -> None:
    """See that weights and configuration are of one model, by the tensor that most architectures call alike."""
    for name, entry in header.items():
        count = math.prod(entry["shape"])
        if name.endswith(EMBEDDINGS) and count != vocabulary * hidden:
            raise InputError(
                f"{item.uri}: {name} has {count:,} numbers, config.json asks for {vocabulary:,} × {hidden:,}. "
                "The files do not belong together; copy the model again"
            )


def weights_header(context: StageContext, item: ExternalInput, path: Path) -> dict[str, Any]:
    """Names, types and shapes of a model's weights from the heads of its files; of those in a bucket, ranges are read.

    Raises:
        InputError: if a file is missing, damaged or cut short.
    """
    in_bucket = not item.uri.startswith(("bundled://", "hf://")) and uris.parse(item.uri).scheme != "file"
    listed = model_objects(context.store, item.uri if in_bucket else f"file://{path}")
    by_name = {uris.basename(info.uri): info for info in listed}

    def read(name: str) -> dict[str, Any]:
        info = by_name[name]
        return read_header(name, info.size, partial(context.store.get_range, info.uri))

    with ThreadPoolExecutor(PARALLEL_OBJECTS) as pool:
        headers = list(pool.map(read, weight_names(path, by_name)))
    return {name: entry for header in headers for name, entry in header.items()}


def _gguf_parameters(path: Path) -> int:
    from plumbline_trainer.models.gguf import shared_reader

    with shared_reader():
        import gguf

        return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(str(path)).tensors)
