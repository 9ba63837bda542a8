"""The one place where messages become token ids.

A row is rendered by the model's chat template and tokenised as a whole. The prompt is what the template renders before
it lets the assistant answer; its ids must be a prefix of the whole dialogue's ids, so that responses can share it.
Where they are not, the row is kept unshared and counted. Sequences are cut at their end: a prompt is never cut, so the
responses of a row truncate it alike (not at all), and a row whose answer would be cut away is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import TYPE_CHECKING, Literal

from plumbline_trainer.data.rows import Message, Response, Row
from plumbline_trainer.data.templates import Renderer, begins_with_bos
from plumbline_trainer.errors import InputError

if TYPE_CHECKING:
    from plumbline_trainer.models.tokenizer import Tokenizer

Method = Literal["text", "completion", "all", "assistant", "preference", "unpaired", "ranked", "score", "prompt"]
"""What carries loss.

- text: every token of raw text but the first
- completion: the answer to the row's prompt (of a preference row, the chosen one)
- all: every token of the dialogue but the first
- assistant: every turn of the assistant
- preference: the chosen and the rejected answer
- unpaired: every labelled answer; of a pair, the chosen one is desirable and the rejected one is not
- ranked: every answer, in the row's order, with its rank
- score: as ranked; what is read is a score at its last token, the end token itself
- prompt: nothing; the prompt is for sampling
"""

DESIRABLE: dict[str | None, Literal["desirable", "undesirable"]] = {
    "chosen": "desirable",
    "rejected": "undesirable",
    "desirable": "desirable",
    "undesirable": "undesirable",
}
"""What a label says of an answer by itself."""

BATCH = 512
"""Rows tokenised at once."""
EXAMPLES = 5


Role = Literal["completion", "chosen", "rejected", "desirable", "undesirable", "text"]


@dataclass(frozen=True, slots=True)
class EncodedResponse:
    """The ids that follow a prompt."""

    ids: list[int]
    mask: list[bool]
    """Which ids carry loss; as long as `ids`."""
    role: Role
    truncated: bool = False
    """Whether its end was cut off, and with it the end token."""
    reads: tuple[int, ...] = ()
    """Indices of the ids at which scalar heads are read; −1 is the last token of the prompt."""
    rank: int = 0
    """0 is best; equal ones are not compared."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row as token ids. An unshared row has an empty prompt, and its responses hold the whole dialogue."""

    row_id: str
    group: str
    prompt: list[int]
    responses: list[EncodedResponse]
    weight: float = 1.0
    margin: float = 0.0
    """How much better the chosen answer is said to be."""
    score_context: bool = False
    """Whether what stands around the first response's own tokens is scored as well: the prompt and turns of others."""


@dataclass
class EncodedRows:
    """Encoded rows, and what happened on the way."""

    rows: list[Encoded] = field(default_factory=list)
    truncated: int = 0
    """Rows of which at least one response lost its end."""
    dropped: int = 0
    """Rows without a token left to learn from (or, for sampling, whose prompt is too long)."""
    unshared: int = 0
    """Rows whose prompt is no prefix of the dialogue."""
    split: int = 0
    """Documents that were cut into several rows."""
    examples: list[str] = field(default_factory=list)
    """What befell some of them, for people."""

    @property
    def counts(self) -> dict[str, int]:
        """The counts by name."""
        return {
            "rows": len(self.rows),
            "truncated": self.truncated,
            "dropped": self.dropped,
            "unshared": self.unshared,
            "split": self.split,
        }

    def _remark(self, text: str) -> None:
        if len(self.examples) < EXAMPLES:
            self.examples.append(text)


@dataclass(frozen=True, slots=True)
class _Dialogue:
    """A prompt with one of its responses, and which texts must be tokenised for it."""

    prompt: tuple[Message, ...]
    messages: tuple[Message, ...]
    role: Role
    rank: int = 0

    def texts(self, render: Renderer, source: str) -> list[str]:
        """The whole dialogue, then for every turn of the assistant after the prompt what lies before and up to it."""
        whole = render(self.messages, generate=False, source=source)
        found = [whole]
        for index in self.turns:
            found.append(render(self.messages[:index], generate=True, source=source))
            last = index + 1 == len(self.messages)
            found.append(whole if last else render(self.messages[: index + 1], generate=False, source=source))
        return found

    @property
    def turns(self) -> list[int]:
        return [i for i in range(len(self.prompt), len(self.messages)) if self.messages[i].role == "assistant"]


def encode_rows(rows: Iterable[Row], tokenizer: Tokenizer, *, method: Method, max_length: int) -> EncodedRows:
    """Encode rows in order; a pure function of the rows, the tokenizer and the settings.

    Args:
        rows: what to encode; raw-text rows are encoded as text whatever the method.
        tokenizer: of the policy.
        method: what carries loss.
        max_length: longest sequence in tokens, prompt and response together.

    Raises:
        InputError: where the template refuses a row, where a row lacks what the method needs, or where no row is left.
    """
    found, given = EncodedRows(), 0
    render, source = Renderer(tokenizer), iter(rows)
    while batch := list(islice(source, BATCH)):
        given += len(batch)
        for is_text, group in groupby(batch, key=lambda row: row.is_text):
            some = list(group)
            if is_text:
                _add_texts(found, some, tokenizer, max_length)
            elif method == "text":
                raise InputError(f"{some[0].source}: raw text is needed, the row is a dialogue")
            elif method == "prompt":
                _add_prompts(found, some, tokenizer, render, max_length)
            else:
                _add_dialogues(found, some, tokenizer, render, method, max_length)
    if given and not found.rows:
        raise InputError(
            f"none of {given:,} rows has a token left to learn from within {max_length} tokens "
            f"({'; '.join(found.examples[:2])}). Raise training.maxLength"
        )
    return found


def encode(row: Row, tokenizer: Tokenizer, *, method: Method, max_length: int) -> EncodedRows:
    """Encode one row."""
    return encode_rows([row], tokenizer, method=method, max_length=max_length)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of rendered texts: nothing is put before or after them, so that no begin token is doubled."""
    if not texts:
        return []
    return [list(ids) for ids in tokenizer.hf(list(texts), add_special_tokens=False)["input_ids"]]


def _add_texts(found: EncodedRows, rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> None:
    begin = [tokenizer.bos_id] if begins_with_bos(tokenizer) and tokenizer.bos_id is not None else []
    end = tokenizer.hf.eos_token_id
    end = tokenizer.end_tokens[0] if end is None else int(end)
    for row, ids in zip(rows, tokenize(tokenizer, [row.responses[0].text for row in rows]), strict=True):
        _add_text(found, row, [*begin, *ids, end], max_length)


def _add_text(found: EncodedRows, row: Row, ids: list[int], max_length: int) -> None:
    """Documents longer than a sequence go on in the next one: nothing is lost but the label of each first token."""
    pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    if len(pieces[-1]) < 2:
        pieces.pop()  # one token alone has no label
    if not pieces:
        found.dropped += 1
        return
    found.split += len(pieces) > 1
    for number, piece in enumerate(pieces):
        response = EncodedResponse(piece, [False] + [True] * (len(piece) - 1), "text")
        name = f"{row.id}/{number}" if len(pieces) > 1 else row.id
        found.rows.append(Encoded(name, row.group, [], [response], row.weight))


def _add_prompts(
    found: EncodedRows, rows: Sequence[Row], tokenizer: Tokenizer, render: Renderer, max_length: int
) -> None:
    texts = [render(row.prompt, generate=True, source=row.source) for row in rows]
    for row, ids in zip(rows, tokenize(tokenizer, texts), strict=True):
        if len(ids) > max_length:
            found.dropped += 1
            found._remark(f"{row.source}: dropped, its prompt has {len(ids):,} tokens of at most {max_length:,}")
        else:
            found.rows.append(Encoded(row.id, row.group, ids, [], row.weight))


def _dialogues(row: Row, method: Method) -> list[_Dialogue]:
    if method == "preference":
        chosen, rejected = row.labelled("chosen"), row.labelled("rejected")
        if chosen is None or rejected is None:
            raise InputError(f"{row.source}: a chosen and a rejected answer are needed")
        return [
            _Dialogue(row.prompt, row.prompt + chosen.messages, "chosen"),
            _Dialogue(row.prompt, row.prompt + rejected.messages, "rejected"),
        ]
    if method == "unpaired":
        labelled = [response for response in row.responses if response.label in DESIRABLE]
        if not labelled:
            raise InputError(f"{row.source}: an answer with a label, or a chosen and a rejected one, is needed")
        return [_Dialogue(row.prompt, row.prompt + item.messages, DESIRABLE[item.label]) for item in labelled]
    if method in ("ranked", "score"):
        answers = [(response, response.rank or 0) for response in row.responses]
        return [_Dialogue(row.prompt, row.prompt + answer.messages, "completion", rank) for answer, rank in answers]
    messages = row.prompt + _answer(row).messages
    if method == "assistant":
        first = next(index for index, message in enumerate(messages) if message.role == "assistant")
        return [_Dialogue(messages[:first], messages, "completion")]
    return [_Dialogue(row.prompt, messages, "completion")]


def _answer(row: Row) -> Response:
    if not row.responses:
        raise InputError(f"{row.source}: the row has a prompt but no answer")
    return row.chosen


def _add_dialogues(
    found: EncodedRows, rows: Sequence[Row], tokenizer: Tokenizer, render: Renderer, method: Method, max_length: int
) -> None:
    dialogues = [_dialogues(row, method) for row in rows]
    texts = [[item.texts(render, row.source) for item in items] for row, items in zip(rows, dialogues, strict=True)]
    distinct = list(dict.fromkeys(text for items in texts for item in items for text in item))
    ids = dict(zip(distinct, tokenize(tokenizer, distinct), strict=True))
    for row, items, rendered in zip(rows, dialogues, texts, strict=True):
        sequences = [[ids[text] for text in item] for item in rendered]
        _add_dialogue(found, row, items, sequences, tokenizer, method, max_length)


def _add_dialogue(
    found: EncodedRows,
    row: Row,
    items: Sequence[_Dialogue],
    sequences: Sequence[list[list[int]]],
    tokenizer: Tokenizer,
    method: Method,
    max_length: int,
) -> None:
    """Put one row together from the ids of its dialogues (whole, then before and up to each turn of the assistant)."""
    wholes = [_with_end(sequence, tokenizer) for sequence in sequences]
    prompt = sequences[0][1]
    shared = method != "all" and all(whole[: len(prompt)] == prompt and len(whole) > len(prompt) for whole, _ in wholes)
    if method != "all" and not shared:
        found.unshared += 1
        found._remark(f"{row.source}: not shared, its prompt is no prefix of the dialogue under the model's template")
    length = len(prompt) if shared else 0
    responses = []
    for item, (whole, mask) in zip(items, wholes, strict=True):
        if method == "all":
            mask = [True] * len(whole)
        kept = slice(length, max_length)
        marks = mask[kept]
        if not shared and marks:
            marks[0] = False  # nothing comes before it that could predict it
        ids = whole[kept]
        reads = (len(ids) - 1,) if method == "score" else ()
        responses.append(EncodedResponse(ids, marks, item.role, len(whole) > max_length, reads, item.rank))
    if not all(any(response.mask) for response in responses):
        found.dropped += 1
        found._remark(
            f"{row.source}: dropped, its prompt has {len(prompt):,} tokens and leaves no room for the answer "
            f"within {max_length:,}"
        )
        return
    found.truncated += any(response.truncated for response in responses)
    found.rows.append(Encoded(row.id, row.group, prompt if shared else [], responses, row.weight, row.margin))


def _with_end(sequence: Sequence[list[int]], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """A dialogue's ids up to the end of its last answer, and which of them the assistant wrote.

    The end of each turn belongs to it. What a template writes after the last end token is cut: nothing follows it. A
    template that ends answers with no token of its own gets the tokenizer's.
    """
    whole, ends = list(sequence[0]), set(tokenizer.end_tokens)
    mask = [False] * len(whole)
    for position in range(1, len(sequence), 2):
        before, upto = sequence[position], sequence[position + 1]
        start, stop = _common(before, whole), _common(upto, whole)
        last = position + 2 == len(sequence)
        end = next((i for i in range(stop - 1, start - 1, -1) if whole[i] in ends), None)
        if end is not None:
            stop = end + 1
            if last:
                del whole[stop:], mask[stop:]
        elif last:
            whole.append(tokenizer.end_tokens[0])
            mask.append(False)
            stop = len(whole)
        mask[start:stop] = [True] * (stop - start)
    return whole, mask


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """Length of the common beginning."""
    if len(some) <= len(others) and list(others[: len(some)]) == list(some):
        return len(some)
    return next(i for i, pair in enumerate(zip([*some, None], [*others, None], strict=False)) if pair[0] != pair[1])
