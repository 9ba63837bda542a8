"""What preflight finds in a dataset: rows, splits, lengths, and prompts that stand in two places."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, TypeVar

from plumbline_api.fingerprint import digest_of
from plumbline_api.record import ExternalInput
from plumbline_api.stagerun import StageInput
from pydantic.alias_generators import to_camel

from plumbline_trainer.data.encode import Method, encode_rows
from plumbline_trainer.data.labels import LabelCounts, count_labels
from plumbline_trainer.data.loading import load_dataset, unscored_row
from plumbline_trainer.data.rows import Row
from plumbline_trainer.data.splits import SPLITS, split_of
from plumbline_trainer.storage import uris

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext
    from plumbline_trainer.models.tokenizer import Tokenizer

FINDINGS_VERSION = 5
"""Raised when the same rows would be found otherwise."""
MEASURED_ROWS = 20_000
"""Rows whose tokens are counted at most; of more, evenly spread ones are taken."""
QUANTILES = 100
METHODS: dict[str, Method] = {"preference": "preference", "ranked": "score", "unpaired": "unpaired", "prompt": "prompt"}
"""How rows are encoded to be measured, by format; the others by their answer."""
NO_LIMIT = 2**40

Measured = TypeVar("Measured", int, list[int])


@dataclass(frozen=True)
class SplitFindings:
    """One split of a dataset."""

    rows: int
    quantiles: list[int]
    """Tokens of a row (prompt and longest answer) at 0 %, 1 %, … 100 %; empty without rows."""
    answers: float = 1.0
    """Answers of a row, in the mean."""
    desirable: int = 0
    """Answers that a label calls good; of a pair, the chosen one."""
    undesirable: int = 0
    prompts: list[int] = field(default_factory=list)
    """Tokens of a prompt at 0 %, 1 %, … 100 %."""
    longest: str = ""
    """Where the row with the longest prompt was read."""
    shapes: list[list[int]] = field(default_factory=list)
    """Tokens of the prompt, then of each answer, of the rows at 0 %, 1 %, … 100 % by their sum."""
    is_text: bool = False
    """Whether rows are raw text, which goes on in the next sequence where it is longer than one."""
    unscored: str = ""
    """Where the first row with an answer that has no score was read; empty where there is none."""

    @property
    def labels(self) -> LabelCounts:
        """Answers by label."""
        return LabelCounts(self.desirable, self.undesirable)

    def percentile(self, share: int) -> int:
        """Tokens that so many percent of rows do not exceed."""
        return self.quantiles[share] if self.quantiles else 0

    def sequences(self, max_length: int) -> int:
        """Rows as they are trained: raw text longer than `max_length` makes several."""
        if not self.is_text or not self.quantiles:
            return self.rows
        # One token alone has no label and is left out.
        pieces = sum(math.ceil((length - 1) / max_length) for length in self.quantiles)
        return max(1, round(self.rows * pieces / len(self.quantiles)))

    def tokens(self, max_length: int) -> float:
        """Tokens of all rows; each is cut at `max_length`, or, of raw text, goes on in the next sequence."""
        if not self.quantiles:
            return 0.0
        limit = NO_LIMIT if self.is_text else max_length
        return self.rows * sum(min(length, limit) for length in self.quantiles) / len(self.quantiles)

    def packed(self, max_length: int, *, as_pairs: bool) -> list[int]:
        """Tokens of each measured row as it is packed: its prompt once, then each answer cut at the limit.

        Args:
            max_length: longest prompt and answer together; a row whose prompt leaves no room is dropped and counts 0.
            as_pairs: whether only the first and the last answer are taken, the best and the worst of a ranked row.
        """
        found = []
        for prompt, *answers in self.shapes:
            taken = [answers[0], answers[-1]] if as_pairs and len(answers) > 1 else answers
            room = max_length - prompt
            found.append(prompt + sum(min(answer, room) for answer in taken) if room > 0 else 0)
        return found


@dataclass(frozen=True)
class DatasetFindings:
    """A dataset."""

    name: str
    format: str
    records: int
    bad: int
    bad_examples: list[str]
    equal_pairs: int
    splits: dict[str, SplitFindings]
    groups: dict[str, list[str]]
    """Normalised prompts by split: the first 16 hex digits of their hashes."""
    examples: list[str]
    """Rows with a remark, such as a prompt that the template does not keep as a prefix."""

    @property
    def rows(self) -> int:
        """Usable rows."""
        return sum(split.rows for split in self.splits.values())

    def to_plan(self) -> dict[str, object]:
        """For plan.json: without the prompts' hashes, with the usual percentiles."""
        document = {to_camel(key): value for key, value in asdict(self).items() if key != "groups"}
        document["splits"] = {
            name: {"rows": split.rows, "tokens": {f"p{share}": split.percentile(share) for share in (50, 90, 99, 100)}}
            for name, split in self.splits.items()
            if split.rows
        }
        return document


def as_input(item: ExternalInput, digest: str) -> StageInput:
    """The input as a stage would be given it."""
    return StageInput(
        role="dataset",
        name=item.name.removeprefix("dataset/"),
        kind="dataset",
        uri=item.uri,
        digest=digest,
        settings=item.settings,
    )


def survey(
    context: StageContext, item: ExternalInput, digest: str, model_digest: str, tokenizer: Tokenizer | None
) -> DatasetFindings | None:
    """What is in a dataset; from the cache where the same content was read with the same model.

    Args:
        context: of preflight.
        item: the dataset.
        digest: its pin.
        model_digest: pin of the model whose tokenizer measures the rows.
        tokenizer: of that model; None to look into the cache only.

    Returns:
        The findings; None if they are not in the cache and there is no tokenizer.

    Raises:
        InputError: if it cannot be read, or has more bad rows than allowed.
    """
    key = digest_of([digest, item.settings, model_digest, FINDINGS_VERSION])
    place = uris.join(context.namespace_root, f"findings/dataset-{key[:32]}.json.gz")
    known = _cached(context, place, item)
    if known is not None or tokenizer is None:
        return known
    found = _survey(context, as_input(item, digest), tokenizer)
    document = json.dumps(asdict(found), separators=(",", ":")).encode()
    context.store.put_bytes(place, gzip.compress(document, compresslevel=3, mtime=0))
    return found


def _cached(context: StageContext, place: str, item: ExternalInput) -> DatasetFindings | None:
    try:
        document = json.loads(gzip.decompress(context.store.get_bytes(place)))
        splits = {name: SplitFindings(**split) for name, split in document.pop("splits").items()}
        name = item.name.removeprefix("dataset/")
        return DatasetFindings(**{**document, "name": name, "splits": splits})
    except (FileNotFoundError, OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _survey(context: StageContext, item: StageInput, tokenizer: Tokenizer) -> DatasetFindings:
    parsed = load_dataset(context, item)
    by_split: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row in parsed.rows:
        by_split[split_of(row, item.settings)].append(row)
    method = METHODS.get(parsed.format, "completion")
    splits, examples = {}, list[str]()
    for name, rows in by_split.items():
        lengths, prompts, shapes, longest = list[int](), list[int](), list[list[int]](), ""
        measured = _spread(rows, MEASURED_ROWS)
        if measured:
            encoded = encode_rows(measured, tokenizer, method=method, max_length=NO_LIMIT)
            examples += encoded.examples
            lengths = sorted(
                len(row.prompt) + max((len(response.ids) for response in row.responses), default=0)
                for row in encoded.rows
            )
            # A prompt that is not shared lies within the answers, and is not measured.
            prompts = sorted(len(row.prompt) for row in encoded.rows)
            shapes = sorted(
                ([len(row.prompt), *(len(item.ids) for item in row.responses)] for row in encoded.rows), key=sum
            )
            places = {row.id: row.source for row in measured}
            top = max(encoded.rows, key=lambda row: len(row.prompt))
            longest = places.get(top.row_id, "")
        labels = count_labels(response.label for row in rows for response in row.responses)
        splits[name] = SplitFindings(
            rows=len(rows),
            quantiles=quantiles(lengths),
            answers=sum(len(row.responses) for row in rows) / len(rows) if rows else 1.0,
            desirable=labels.desirable,
            undesirable=labels.undesirable,
            prompts=quantiles(prompts),
            longest=longest,
            shapes=quantiles(shapes),
            is_text=parsed.format == "text",
            unscored=unscored_row(rows) or "",
        )
    return DatasetFindings(
        name=item.name,
        format=parsed.format,
        records=parsed.records,
        bad=parsed.bad_count,
        bad_examples=parsed.bad,
        equal_pairs=parsed.equal_pairs,
        splits=splits,
        groups={name: sorted({row.group[:16] for row in rows}) for name, rows in by_split.items()},
        examples=examples[:5],
    )


def _spread(rows: Sequence[Row], count: int) -> Sequence[Row]:
    if len(rows) <= count:
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]


def quantiles(values: Sequence[Measured]) -> list[Measured]:
    """The values at 0 %, 1 %, … 100 % of a sorted list (nearest rank)."""
    if not values:
        return []
    return [
        values[min(len(values) - 1, math.ceil(share * len(values) / QUANTILES) - (share > 0))] for share in range(101)
    ]


@dataclass(frozen=True, slots=True)
class Leak:
    """Prompts that are trained on in one dataset and tested on in another."""

    trained: str
    tested: str
    count: int
    of: int


def find_leaks(
    findings: Iterable[DatasetFindings], trained: Iterable[str], tested: Iterable[tuple[str, str]]
) -> list[Leak]:
    """Held-out prompts that stand in the training split of another dataset.

    Args:
        findings: of all datasets.
        trained: names of the datasets that stages train on.
        tested: name and split of what evaluations read.
    """
    by_name = {item.name: item for item in findings}
    found = []
    for name, split in dict.fromkeys(tested):
        held_out = set(by_name[name].groups[split])
        for other in dict.fromkeys(trained):
            if (other, "train") == (name, split):
                continue
            common = len(held_out.intersection(by_name[other].groups["train"]))
            if common:
                found.append(Leak(other, name, common, len(held_out)))
    return found
