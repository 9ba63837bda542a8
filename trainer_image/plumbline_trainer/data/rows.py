"""Row v1: the one canonical row behind every dataset format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TEXT_ROLE = "text"
"""Role of the single message of a raw-text row: it is no turn of anybody and never goes through a chat template."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str

    def to_chat(self) -> dict[str, str]:
        """The form that chat templates take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to the row's prompt, with whatever is known about it."""

    id: str
    messages: tuple[Message, ...]
    score: float | None = None
    rank: int | None = None
    """0 is best."""
    label: str | None = None
    """`chosen` or `rejected` in preference rows, and in ranked ones of the best and the worst; in unpaired rows
    `desirable` or `undesirable`."""
    annotations: dict[str, Any] = field(default_factory=dict)
    policy_digest: str | None = None
    """The policy that wrote it."""
    sampling: dict[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None

    @property
    def text(self) -> str:
        """Content of its last message."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt and its responses. Raw text has no prompt and one response with a message of role `text`."""

    id: str
    """Unique in the dataset and a function of its content: the order of training depends on it."""
    group: str
    """Equal for rows of the same normalised prompt."""
    prompt: tuple[Message, ...]
    responses: tuple[Response, ...]
    weight: float = 1.0
    source: str = ""
    """Where it was read: `file line N`."""
    margin: float = 0.0
    """How much better the chosen answer is said to be; for reward models."""

    @property
    def is_text(self) -> bool:
        """Whether it is raw text."""
        return not self.prompt and len(self.responses) == 1 and self.responses[0].messages[0].role == TEXT_ROLE

    def labelled(self, label: str) -> Response | None:
        """The response with a label."""
        return next((response for response in self.responses if response.label == label), None)

    @property
    def chosen(self) -> Response:
        """The response to imitate: the one labelled chosen, else the first."""
        return self.labelled("chosen") or self.responses[0]
