"""Which rows are held out: by a hash of the normalised prompt, so that equal prompts never stand on both sides."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from plumbline_trainer.data.rows import Message, Row

Split = Literal["train", "evaluation", "test"]
SPLITS: tuple[Split, ...] = ("train", "evaluation", "test")
DOCUMENT_START = 256
"""Characters of a document that stand for its prompt."""


def normalise(text: str) -> str:
    """Unicode NFKC, small letters, single spaces: what differs only so counts as equal."""
    # Folding case can undo the normal form, so it is taken again.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def prompt_group(prompt: Sequence[Message], text: str | None = None) -> str:
    """Identity of a normalised prompt (of a document: of its beginning), 32 hex digits."""
    if prompt:
        normal = "\x1f".join(normalise(turn.content) for turn in prompt if turn.content.strip())
    else:
        normal = normalise(text or "")[:DOCUMENT_START]
    return hashlib.sha256(normal.encode()).hexdigest()[:32]


def position(group: str) -> float:
    """A prompt's place in [0, 1), uniform over prompts."""
    return int(hashlib.sha256(f"split/{group}".encode()).hexdigest()[:13], 16) / 16**13


def split_of(row: Row, settings: Mapping[str, Any]) -> Split:
    """The split of a row: [0, test) is test, [test, test + evaluation) evaluation, the rest train."""
    if settings.get("role") == "test":
        return "test"
    shares = settings.get("split") or {}
    test, evaluation = float(shares.get("test", 0)), float(shares.get("evaluation", 0))
    place = position(row.group)
    if place < test:
        return "test"
    return "evaluation" if place < test + evaluation else "train"
