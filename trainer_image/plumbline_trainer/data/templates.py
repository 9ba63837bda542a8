"""Chat templates: how messages become the text that is tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from plumbline_trainer.data.rows import Message
from plumbline_trainer.errors import InputError

if TYPE_CHECKING:
    from plumbline_trainer.models.tokenizer import Tokenizer

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For models without a chat template. The generation prompt ends before the space, because most vocabularies hold a
word together with the space before it; so the prompt's ids are a prefix of the whole dialogue's."""


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts its begin token before every text on its own account."""
    bos = tokenizer.bos_id
    return bos is not None and list(tokenizer.hf("a", add_special_tokens=True)["input_ids"])[:1] == [bos]


def effective_template(tokenizer: Tokenizer) -> str:
    """The template in use: the tokenizer's own, else the plain one (with the begin token where texts begin with it)."""
    if tokenizer.template is not None:
        return tokenizer.template
    return ("{{ bos_token }}" if begins_with_bos(tokenizer) else "") + PLAIN_TEMPLATE


class Renderer:
    """Renders messages with one template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._hf = tokenizer.hf
        self._template = effective_template(tokenizer)
        self._settings: dict[str, Any] = {}
        if tokenizer.hf.eos_token is None:
            # The plain template ends answers with the end token, whatever the tokenizer calls it.
            self._settings["eos_token"] = str(tokenizer.hf.convert_ids_to_tokens(tokenizer.end_tokens[0]))

    def __call__(self, messages: Sequence[Message], *, generate: bool, source: str) -> str:
        """The text of a dialogue; with `generate`, up to where the assistant begins to answer.

        Raises:
            InputError: naming the row, where the model's template refuses the dialogue.
        """
        from jinja2.exceptions import TemplateError

        try:
            text = self._hf.apply_chat_template(
                [message.to_chat() for message in messages],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generate,
                **self._settings,
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message.role for message in messages)
            raise InputError(
                f"{source}: the model's chat template refuses the dialogue ({roles}): {error}. "
                "Change the row or choose another model"
            ) from error
        return str(text)
