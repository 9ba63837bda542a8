"""GGUF files: transformers dequantises them; here it is kept from reading the same header three times.

The reader of the gguf package walks the vocabulary one memory-map view at a time, and transformers opens the file for
the settings, the tokenizer and the weights separately: half a minute for a model of 135M parameters. With plain arrays
and one reader per file it is a few seconds, for the same values.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from plumbline_api.errors import InputError

MAGIC = b"GGUF"
_lock = RLock()


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


@contextmanager
def shared_reader() -> Iterator[None]:
    """While this is open, every GGUF file is parsed once, whoever asks.

    Raises:
        InputError: if the gguf package is not installed.
    """
    try:
        import gguf
        import numpy as np
    except ImportError as error:
        raise InputError(
            "the model is a GGUF file, and the package gguf is not installed: "
            "pip install '.[trainer,demo]' in a checkout of Plumbline"
        ) from error

    if hasattr(gguf.GGUFReader, "cache_info"):  # An outer block shares already.
        yield
        return

    class PlainReader(gguf.GGUFReader):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            # Views of a memory map carry bookkeeping that costs more than the parsing itself.
            object.__setattr__(self, name, np.asarray(value) if isinstance(value, np.memmap) else value)

    with _lock:
        kept = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader = functools.cache(PlainReader)
        gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = kept
