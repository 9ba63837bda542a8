"""The tokenizer of a policy with its chat template and the tokens that end an answer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from plumbline_api.fingerprint import canonical_json

_PROBE_ANSWER = "plumb"


@dataclass(frozen=True)
class Tokenizer:
    """What turns messages into token ids and back."""

    hf: Any
    """A fast tokenizer of transformers (`PreTrainedTokenizerBase`)."""
    template: str | None
    """Chat template (Jinja); None for base models without one."""
    end_tokens: tuple[int, ...]
    """Ids that end an answer, the one that training appends first. Never empty."""

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text; None where the model knows none."""
        return None if self.hf.bos_token_id is None else int(self.hf.bos_token_id)

    @property
    def pad_id(self) -> int:
        """An id to fill batches with. It is masked everywhere, so that it may equal an end token."""
        return self.end_tokens[0] if self.hf.pad_token_id is None else int(self.hf.pad_token_id)

    def decode(self, ids: list[int]) -> str:
        """The text of an answer without special tokens, exactly as generated."""
        return str(self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of vocabulary, rules, template and end tokens: equal digests give equal ids."""
        backend = getattr(self.hf, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else canonical_json(self.hf.get_vocab()).decode()
        identity = {"rules": rules, "template": self.template, "endTokens": list(self.end_tokens)}
        return hashlib.sha256(canonical_json(identity)).hexdigest()


def make_tokenizer(hf: Any, *, declared_ends: tuple[int, ...] = ()) -> Tokenizer:
    """Wrap a tokenizer of transformers.

    The end tokens are, in this order: what the chat template writes directly after an answer, the tokenizer's own end
    token, and the ends that the model's generation settings declare.
    """
    template = _default_template(hf.chat_template)
    ends: list[int] = []
    if template is not None:
        ends += _end_of_turn(hf, template)
    if hf.eos_token_id is not None:
        ends.append(int(hf.eos_token_id))
    ends += declared_ends
    if not ends and hf.pad_token_id is not None:
        ends.append(int(hf.pad_token_id))
    if not ends:
        raise ValueError("the tokenizer names no token that ends a text")
    return Tokenizer(hf=hf, template=template, end_tokens=tuple(dict.fromkeys(ends)))


def _default_template(declared: Any) -> str | None:
    """A tokenizer may declare one template or several by name."""
    if isinstance(declared, dict):
        chosen = declared.get("default") or next(iter(declared.values()), None)
        return None if chosen is None else str(chosen)
    return None if not declared else str(declared)


def _end_of_turn(hf: Any, template: str) -> list[int]:
    """The special token that the template writes directly after an answer, if it writes one."""
    messages = [{"role": "user", "content": "line"}, {"role": "assistant", "content": _PROBE_ANSWER}]
    try:
        text = hf.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception:
        # Templates may refuse a dialogue for reasons of their own; the tokenizer's end token then serves.
        return []
    rest = text[text.rfind(_PROBE_ANSWER) + len(_PROBE_ANSWER) :].lstrip()
    special = {int(index): str(token) for index, token in hf.added_tokens_decoder.items() if token.special}
    return [index for index, token in special.items() if rest.startswith(token)][:1]
