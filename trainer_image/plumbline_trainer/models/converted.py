"""GGUF models, dequantised once per machine: kept in `$PLUMBLINE_CACHE` as a model folder and verified before each use.

Without that variable nothing is kept: a pod that reads a model once would only pay for the copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

from plumbline_trainer.storage.files import file_digest

CACHE_ENV = "PLUMBLINE_CACHE"
DIGESTS = "digests.json"
FORMAT = 1
"""Raised when what is kept would come out otherwise for the same file."""


def kept_folder(source: Path, names: Iterable[str] | None = None) -> Path | None:
    """The folder kept for a GGUF file, if it is there and its files are those that were written.

    Args:
        source: the GGUF file.
        names: files that are needed; None: all of them.
    """
    folder = _place(source)
    return folder if folder is not None and _sound(folder, names) else None


def keep(source: Path, write: Callable[[Path], None]) -> Path | None:
    """The folder kept for a GGUF file; `write` fills it where there is none. None where nothing can be kept."""
    folder = _place(source)
    if folder is None:
        return None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{folder.name}.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _sound(folder, None):
                return folder
            shutil.rmtree(folder, ignore_errors=True)
            partial = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(partial)
            digests = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
            (partial / DIGESTS).write_text(json.dumps(digests, indent=1), encoding="utf-8")
            partial.rename(folder)
            return folder
    except OSError:
        return None  # A full or read-only disk costs time, never a run.


def _place(source: Path) -> Path | None:
    root = os.environ.get(CACHE_ENV)
    if not root:
        return None
    identity = [FORMAT, file_digest(source), version("transformers"), version("gguf")]
    return Path(root) / "gguf" / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _sound(folder: Path, names: Iterable[str] | None) -> bool:
    try:
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        wanted = digests if names is None else {name: digests[name] for name in names if name in digests}
        return bool(wanted) and all(file_digest(folder / name) == digest for name, digest in wanted.items())
    except (OSError, ValueError, AttributeError):
        return False
