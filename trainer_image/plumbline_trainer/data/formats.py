"""From raw records to rows, for every dataset format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from plumbline_api.artifacts import DATASET_FORMATS

from plumbline_trainer.data.dialogues import common_text, common_turns, looks_like_dialogue, parse_dialogue
from plumbline_trainer.data.ranked import rank_completions
from plumbline_trainer.data.records import BadRowError, Record, SourceFile, is_number, kind_of, read_records
from plumbline_trainer.data.rows import TEXT_ROLE, Message, Response, Row
from plumbline_trainer.data.splits import prompt_group
from plumbline_trainer.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
REQUIRED: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "ranked": ("prompt", "completions"),
    "messages": ("messages",),
    "instruction": ("instruction", "output"),
    "contextResponse": ("context", "response"),
    "unpaired": ("prompt", "completion", "label"),
    "promptCompletion": ("prompt", "completion"),
    "dialogue": ("dialogue",),
    "text": ("text",),
}
"""Fields that a row must have; in this order formats are detected."""
OPTIONAL: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", "margin"),
    "instruction": ("input",),
    "dialogue": ("text",),
}
EVERYWHERE = ("weight",)
"""Fields that any format may have, if `columns` names them."""
EXAMPLES = 3


@dataclass
class ParsedDataset:
    """The rows of a dataset, and what was found on the way."""

    format: str
    rows: list[Row] = field(default_factory=list)
    records: int = 0
    bad: list[str] = field(default_factory=list)
    """The first bad rows: where and what."""
    bad_count: int = 0
    equal_pairs: int = 0
    """Preference rows whose answers are the same: they teach nothing."""


def parse_dataset(files: Iterable[SourceFile], name: str, settings: Mapping[str, Any]) -> ParsedDataset:
    """Read every row of a dataset.

    Args:
        files: its files, in order.
        name: of the dataset, for messages.
        settings: `format`, `columns`, `limit`, `maxBadRows` as in the record.

    Raises:
        InputError: if it is empty, if its format cannot be told, or if more rows are bad than are allowed.
    """
    files = list(files)
    columns = dict(settings.get("columns") or {})
    format_ = str(settings.get("format") or "auto")
    if format_ == "auto":
        format_ = detect_format(files, name, columns)
    _check_columns(name, format_, columns)
    found, seen = ParsedDataset(format_), dict[str, int]()
    limit = settings.get("limit")
    for record in islice(_records(files), limit):
        found.records += 1
        try:
            row = parse_record(record, format_, columns)
        except BadRowError as error:
            found.bad_count += 1
            if len(found.bad) < EXAMPLES:
                found.bad.append(f"{record.where}: {error}")
            continue
        count = seen[row.id] = seen.get(row.id, 0) + 1
        found.rows.append(row if count == 1 else _renamed(row, f"{row.id}-{count}"))
        found.equal_pairs += len(row.responses) == 2 and row.responses[0].messages == row.responses[1].messages
    allowed = int(settings.get("maxBadRows") or 0)
    if found.bad_count > allowed:
        share = f"{found.bad_count:,} bad row{'s' if found.bad_count > 1 else ''} of {found.records:,}"
        more = f", {allowed:,} allowed" if allowed else ""
        raise InputError(f"{found.bad[0]} ({share}{more}; allow some with datasets[].maxBadRows)")
    if not found.rows:
        where = files[0].uri if len(files) == 1 else f"{len(files)} files of dataset {name}"
        what = (
            "has no rows" if not found.records else f"has no usable rows ({found.bad_count:,} are bad: {found.bad[0]})"
        )
        raise InputError(f"{where} {what}. Check datasets[].source")
    return found


def detect_format(files: Iterable[SourceFile], name: str, columns: Mapping[str, str]) -> str:
    """The format of a dataset, told by the fields of its first readable record.

    Raises:
        InputError: if they fit no format; the columns are named.
    """
    files, first_fault = list(files), ""
    for record in _records(files):
        if record.value is None:
            first_fault = first_fault or f" ({record.where}: {record.problem})"
            continue
        present = {key for key in record.value if record.value[key] is not None}
        for format_, required in REQUIRED.items():
            if all(columns.get(column, column) in present for column in required):
                text = record.value[columns.get("text", "text")] if format_ == "text" else None
                return "dialogue" if isinstance(text, str) and looks_like_dialogue(text) else format_
        shown = ", ".join(sorted(record.value)) or "none"
        known = "; ".join(f"{kind}: {', '.join(required)}" for kind, required in REQUIRED.items())
        raise InputError(
            f'dataset "{name}" ({record.where}): the columns ({shown}) fit no format. Map them with '
            f"datasets[].columns, such as columns: {{prompt: question}}. Formats and their fields: {known}"
        )
    where = files[0].uri if len(files) == 1 else f"{len(files)} files"
    raise InputError(f'dataset "{name}" ({where}) has no readable rows{first_fault}. Check datasets[].source')


def parse_record(record: Record, format_: str, columns: Mapping[str, str]) -> Row:
    """One row.

    Raises:
        BadRowError: with what is wrong with it.
    """
    if record.value is None:
        raise BadRowError(record.problem)
    fields = _fields(record.value, format_, columns)
    prompt, responses = PARSERS[format_](fields)
    identity = [[m.role, m.content] for m in prompt], [[m.role, m.content] for r in responses for m in r.messages]
    digest = hashlib.sha256(json.dumps(identity, ensure_ascii=True).encode()).hexdigest()[:16]
    weight = _finite(fields, "weight", columns, positive=True) if "weight" in fields else 1.0
    margin = 0.0 if fields.get("margin") is None else _finite(fields, "margin", columns)
    text = responses[0].text if not prompt else None
    return Row(digest, prompt_group(prompt, text), prompt, responses, weight, record.where, margin)


def _records(files: Iterable[SourceFile]) -> Iterable[Record]:
    for file in files:
        yield from read_records(file)


def _renamed(row: Row, name: str) -> Row:
    return replace(row, id=name)


def _check_columns(name: str, format_: str, columns: Mapping[str, str]) -> None:
    if format_ not in DATASET_FORMATS:
        raise InputError(f'dataset "{name}": there is no format "{format_}". Formats: {", ".join(DATASET_FORMATS)}')
    known = (*REQUIRED[format_], *OPTIONAL.get(format_, ()), *EVERYWHERE)
    for column in columns:
        if column not in known:
            raise InputError(
                f'dataset "{name}": datasets[].columns names a field "{column}" that format {format_} does not have. '
                f"Its fields: {', '.join(known)}"
            )


def _fields(value: Mapping[str, Any], format_: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """The fields of the format, under their own names; missing columns are named."""
    found: dict[str, Any] = {}
    for name in (*REQUIRED[format_], *OPTIONAL.get(format_, ())):
        column = columns.get(name, name)
        if column in value:
            found[name] = value[column]
    if "weight" in columns:
        if columns["weight"] not in value:
            raise BadRowError(f'no column "{columns["weight"]}"; the columns are: {", ".join(sorted(value)) or "none"}')
        found["weight"] = value[columns["weight"]]
    if format_ == "dialogue" and found.get("dialogue") is None and "text" in found:
        found["dialogue"] = found["text"]
    for name in REQUIRED[format_]:
        if name not in found:
            column = columns.get(name, name)
            raise BadRowError(
                f'no column "{column}"; the columns are: {", ".join(sorted(map(str, value))) or "none"}. '
                f"Map one with datasets[].columns, such as columns: {{{name}: …}}"
            )
    return found


def _text(fields: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise BadRowError(f'"{name}" is {kind_of(value)}, text expected')
    if not may_be_empty and not value.strip():
        raise BadRowError(f'"{name}" is empty')
    return value


def _finite(fields: Mapping[str, Any], name: str, columns: Mapping[str, str], *, positive: bool = False) -> float:
    value = fields[name]
    if isinstance(value, str):  # every cell of a CSV file is text
        value = _number(value)
    if not is_number(value) or (positive and value < 0):
        shown = "a negative number" if is_number(value) else kind_of(value)
        wanted = "a number of at least 0" if positive else "a finite number"
        raise BadRowError(f'"{columns.get(name, name)}" is {shown}, {wanted} expected')
    return float(value)


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


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


Parsed = tuple[tuple[Message, ...], tuple[Response, ...]]


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
}
