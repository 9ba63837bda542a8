"""From the fields of a record to a prompt and its answers, for every dataset format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from plumbline_trainer.data.dialogues import common_text, common_turns, looks_like_dialogue, parse_dialogue
from plumbline_trainer.data.ranked import rank_completions
from plumbline_trainer.data.records import BadRowError, kind_of
from plumbline_trainer.data.rows import TEXT_ROLE, Message, Response

ROLES = ("system", "developer", "user", "assistant", "tool")
Parsed = tuple[tuple[Message, ...], tuple[Response, ...]]


def _text(fields: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise BadRowError(f'"{name}" is {kind_of(value)}, text expected')
    if not may_be_empty and not value.strip():
        raise BadRowError(f'"{name}" is empty')
    return value


def parse_messages(value: Any, name: str) -> tuple[Message, ...]:
    """A list of `{role, content}`; content is text, or a list of text parts.

    Raises:
        BadRowError: naming the message.
    """
    if not isinstance(value, list):
        raise BadRowError(f'"{name}" is {kind_of(value)}, a list of messages expected')
    if not value:
        raise BadRowError(f'"{name}" is an empty list')
    return tuple(_message(item, f"{name}[{index}]") for index, item in enumerate(value))


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, dict):
        raise BadRowError(f'"{name}" is {kind_of(item)}, an object with role and content expected')
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or role not in ROLES:
        shown = f'"{role}"' if isinstance(role, str) else "missing" if role is None else kind_of(role)
        raise BadRowError(f'the role of "{name}" is {shown}; roles are {", ".join(ROLES)}')
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type", "text") == "text"]
        if len(parts) != len(content) or not all(isinstance(part, str) for part in parts):
            raise BadRowError(f'the content of "{name}" has parts that are no text; only text is trained on')
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str):
        raise BadRowError(f'the content of "{name}" is {kind_of(content)}, text expected')
    return Message(role, content)


def _parse_text(fields: Mapping[str, Any]) -> Parsed:
    return (), (Response("0", (Message(TEXT_ROLE, _text(fields, "text")),)),)


def _parse_instruction(fields: Mapping[str, Any]) -> Parsed:
    instruction, extra = _text(fields, "instruction"), fields.get("input")
    if extra is not None and not isinstance(extra, str):
        raise BadRowError(f'"input" is {kind_of(extra)}, text expected')
    question = f"{instruction}\n\n{extra}" if extra and extra.strip() else instruction
    return _question(question), _answers(_text(fields, "output"))


def _parse_context_response(fields: Mapping[str, Any]) -> Parsed:
    return _question(_text(fields, "context")), _answers(_text(fields, "response"))


def _parse_dialogue(fields: Mapping[str, Any]) -> Parsed:
    turns = parse_dialogue(_text(fields, "dialogue"))
    if not turns:
        raise BadRowError("no USER: turn in the dialogue; turns begin with USER: and ASSISTANT:")
    return _conversation(turns, "the dialogue")


def _parse_chat(fields: Mapping[str, Any]) -> Parsed:
    return _conversation(parse_messages(fields["messages"], "messages"), '"messages"')


def _conversation(turns: tuple[Message, ...], name: str) -> Parsed:
    """The last turn is the answer, what lies before it the prompt."""
    if turns[-1].role != "assistant":
        raise BadRowError(f"{name} ends with a turn of the {turns[-1].role}; the last turn is the answer to learn")
    if not turns[-1].content.strip():
        raise BadRowError(f"{name} ends with an empty answer")
    if not any(turn.role == "user" for turn in turns[:-1]):
        raise BadRowError(f"{name} has no turn of a user before the answer")
    return turns[:-1], (Response("0", turns[-1:]),)


def _parse_prompt_completion(fields: Mapping[str, Any]) -> Parsed:
    prompt = _prompt(fields)
    return prompt, (Response("0", _answer_turns(fields, "completion", prompt)),)


LABELS: dict[Any, bool] = {"true": True, "1": True, "false": False, "0": False}
"""Labels as text, because every cell of a CSV file is; JSON's own true, false, 1 and 0 are taken as they are."""


def _parse_unpaired(fields: Mapping[str, Any]) -> Parsed:
    desirable = _label(fields["label"])
    prompt = _prompt(fields)
    # An empty answer can be a bad one, as in a pair.
    turns = _answer_turns(fields, "completion", prompt, may_be_empty=not desirable)
    return prompt, (Response("0", turns, label="desirable" if desirable else "undesirable"),)


def _label(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in LABELS:
        return LABELS[value.strip().lower()]
    shown = f'"{value[:40]}"' if isinstance(value, str) else f"{value}" if isinstance(value, int | float) else None
    raise BadRowError(
        f'"label" is {shown or kind_of(value)}; true or false (or 1 or 0) expected: is the completion desirable? '
        "Convert the column, or name format: promptCompletion if it is no such label"
    )


def _parse_preference(fields: Mapping[str, Any]) -> Parsed:
    if fields.get("prompt") is not None:
        prompt = _prompt(fields)
        chosen = _answer_turns(fields, "chosen", prompt)
        rejected = _answer_turns(fields, "rejected", prompt, may_be_empty=True)
    else:
        prompt, chosen, rejected = _implicit_prompt(fields)
    answers = (
        Response("chosen", chosen, rank=0, label="chosen"),
        Response("rejected", rejected, rank=1, label="rejected"),
    )
    return prompt, answers


def _parse_ranked(fields: Mapping[str, Any]) -> Parsed:
    """Best first. The best is labelled chosen and the worst rejected, so that the row serves as a pair, too."""
    prompt = _prompt(fields)
    ranked = rank_completions(fields["completions"])
    answers = []
    for place, item in enumerate(ranked):
        label = "chosen" if place == 0 else "rejected" if place == len(ranked) - 1 else None
        # As in pairs, only the worst answer may be nothing.
        turns = _answer_turns({item.name: item.value}, item.name, prompt, may_be_empty=label == "rejected")
        answers.append(Response(str(item.index), turns, score=item.score, rank=item.rank, label=label))
    return prompt, tuple(answers)


def _prompt(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    value = fields["prompt"]
    if isinstance(value, str):
        return _question(_text(fields, "prompt"))
    if not isinstance(value, list):
        raise BadRowError(f'"prompt" is {kind_of(value)}, text or a list of messages expected')
    turns = parse_messages(value, "prompt")
    if not any(turn.role == "user" for turn in turns):
        raise BadRowError('"prompt" has no turn of a user')
    return turns


def _answer_turns(
    fields: Mapping[str, Any], name: str, prompt: tuple[Message, ...], *, may_be_empty: bool = False
) -> tuple[Message, ...]:
    """An answer given as text or as messages; messages may repeat the prompt."""
    value = fields[name]
    if isinstance(value, str):
        return (Message("assistant", _text(fields, name, may_be_empty=may_be_empty)),)
    if not isinstance(value, list):
        raise BadRowError(f'"{name}" is {kind_of(value)}, text expected')
    turns = parse_messages(value, name)
    if turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    return _checked_answer(turns, name, may_be_empty=may_be_empty)


def _checked_answer(turns: tuple[Message, ...], name: str, *, may_be_empty: bool = False) -> tuple[Message, ...]:
    if not turns:
        raise BadRowError(f'"{name}" has no turn after the prompt')
    for turn, place in ((turns[0], "begins"), (turns[-1], "ends")):
        if turn.role != "assistant":
            raise BadRowError(f'"{name}" {place} with a turn of the {turn.role} after the prompt; an answer expected')
    if not may_be_empty and not turns[-1].content.strip():
        raise BadRowError(f'"{name}" ends with an empty answer')
    return turns


def _implicit_prompt(
    fields: Mapping[str, Any],
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """The common beginning of both answers is the prompt: whole turns of dialogues, else whole lines or words."""
    values = [fields["chosen"], fields["rejected"]]
    if all(isinstance(value, str) for value in values):
        texts = [_text(fields, "chosen"), _text(fields, "rejected")]
        if not all(looks_like_dialogue(text) for text in texts):
            return _implicit_text_prompt(texts)
        chosen, rejected = (parse_dialogue(text) for text in texts)
    else:
        chosen, rejected = parse_messages(values[0], "chosen"), parse_messages(values[1], "rejected")
    count = min(common_turns(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    while count > 0 and "assistant" not in (chosen[count].role, rejected[count].role):
        count -= 1
    if not any(turn.role == "user" for turn in chosen[:count]):
        raise BadRowError('no "prompt", and "chosen" and "rejected" begin with no turn of a user in common')
    answers = _checked_answer(rejected[count:], "rejected", may_be_empty=True)
    return chosen[:count], _checked_answer(chosen[count:], "chosen"), answers


def _implicit_text_prompt(
    texts: list[str],
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    shared = common_text(*texts)
    if not shared.strip():
        raise BadRowError('no "prompt", and "chosen" and "rejected" share no beginning that could be one')
    answers = [text[len(shared) :].strip() for text in texts]
    if not answers[0]:
        raise BadRowError('"chosen" holds nothing beyond what "rejected" begins with')
    return _question(shared.strip()), (Message("assistant", answers[0]),), (Message("assistant", answers[1]),)


def _question(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def _answers(text: str) -> tuple[Response, ...]:
    return (Response("0", (Message("assistant", text),)),)


PARSERS: dict[str, Callable[[Mapping[str, Any]], Parsed]] = {
    "text": _parse_text,
    "instruction": _parse_instruction,
    "contextResponse": _parse_context_response,
    "dialogue": _parse_dialogue,
    "messages": _parse_chat,
    "promptCompletion": _parse_prompt_completion,
    "preference": _parse_preference,
    "unpaired": _parse_unpaired,
    "ranked": _parse_ranked,
    "prompt": lambda fields: (_prompt(fields), ()),
}
