"""Dialogues written as text: `USER:` and `ASSISTANT:` turns."""

from __future__ import annotations

import re
from collections.abc import Sequence

from plumbline_trainer.data.rows import Message

_MARK = re.compile(r"(?:(?<=\s)|^)(SYSTEM|USER|HUMAN|ASSISTANT):|^[ \t]*(System|User|Human|Assistant):", re.MULTILINE)
"""Capitals count wherever a word may begin, other spellings only at the beginning of a line."""
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant"}


def parse_dialogue(text: str) -> tuple[Message, ...]:
    """The turns of a dialogue; text before the first turn is the system's. Empty if it holds no turn of a user.

    Turns are stripped of white space around them; turns of one role in a row are joined by a line break.
    """
    marks = list(_MARK.finditer(text))
    if not marks:
        return ()
    turns: list[Message] = []
    if preamble := text[: marks[0].start()].strip():
        turns.append(Message("system", preamble))
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        role = _ROLES[(mark.group(1) or mark.group(2)).lower()]
        content = text[mark.end() : following.start() if following is not None else len(text)].strip()
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}\n{content}".strip())
        else:
            turns.append(Message(role, content))
    return tuple(turns) if any(turn.role == "user" for turn in turns) else ()


def looks_like_dialogue(text: str) -> bool:
    """Whether a text has a turn of a user and then one of the assistant."""
    roles = [turn.role for turn in parse_dialogue(text)]
    return "user" in roles and "assistant" in roles[roles.index("user") :]


def common_turns(some: Sequence[Message], others: Sequence[Message]) -> int:
    """Number of turns that two dialogues begin with alike."""
    count = 0
    for one, other in zip(some, others, strict=False):
        if one != other:
            break
        count += 1
    return count


def common_text(some: str, others: str) -> str:
    """The beginning that two texts share, back to the end of a line, or of a word if they share no whole line."""
    length = next((i for i, pair in enumerate(zip(some, others, strict=False)) if pair[0] != pair[1]), None)
    if length is None:
        length = min(len(some), len(others))
    shared = some[:length]
    cut = shared.rfind("\n") + 1 or max(shared.rfind(" "), shared.rfind("\t")) + 1
    return shared[:cut]
