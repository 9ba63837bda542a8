"""What a safetensors file holds, by its head alone: wherever it lies, a few kilobytes are read of it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from typing import Any

from plumbline_api.errors import InputError

FIRST_READ = 64 * 1024
"""The head of most files is no longer, so that one read is enough."""
LONGEST = 100_000_000
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}
"""Types that weights may have, as safetensors names them."""


def read_header(name: str, size: int, read: Callable[[int, int], bytes]) -> dict[str, Any]:
    """The header of a safetensors file: name → {dtype, shape, data_offsets}.

    Args:
        name: of the file, for messages.
        size: of the file.
        read: its bytes by offset and length.

    Raises:
        InputError: if it is not a safetensors file, or shorter or longer than its header says.
    """
    try:
        first = read(0, min(size, FIRST_READ))
        (length,) = struct.unpack("<Q", first[:8])
        if length > LONGEST:
            raise ValueError("the header is too long")
        if 8 + length > size:
            raise ValueError("the file ends within its header")
        rest = read(len(first), 8 + length - len(first)) if 8 + length > len(first) else b""
        header: dict[str, Any] = json.loads((first + rest)[8 : 8 + length])
        header.pop("__metadata__", None)
        sizes = [entry["data_offsets"][1] for entry in header.values()]
        for entry in header.values():
            begin, end = entry["data_offsets"]
            bits = BITS.get(entry["dtype"])
            if bits is not None and (end - begin) * 8 != math.prod(entry["shape"]) * bits:
                raise ValueError("a shape does not fit the bytes of its tensor")
        whole = 8 + length + max(sizes, default=0)
    except (struct.error, ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{name} is not a safetensors file: {error}. Copy it again") from error
    if whole != size:
        raise InputError(f"{name} has {size:,} bytes, its header says {whole:,}. Copy it again")
    return header
