"""What one model does on the rows of every suite: likelihoods and answers. Suites compare two of these."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from plumbline_api.errors import InputError
from plumbline_api.evaluation import Generation, Suite

from plumbline_trainer.data.encode import Encoded, EncodedRows, encode_rows
from plumbline_trainer.data.rows import Row
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.pathcheck import choose_path
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.evaluation.generation import generate
from plumbline_trainer.rollout.interface import Prompt

if TYPE_CHECKING:
    from plumbline_trainer.models.policy import Policy

CONTEXT_DEFAULT = 2048
"""Longest sequence of a model whose configuration does not say."""
ANSWER_WEIGHT = 4
"""Work of one token that is generated, in tokens that are scored; for the estimate of the time left."""


@dataclass(frozen=True)
class SuiteRows:
    """A suite with the rows that it reads."""

    index: int
    suite: Suite
    rows: tuple[Row, ...]

    @property
    def kind(self) -> str:
        """Such as `winRate`."""
        return self.suite.choice

    @property
    def generation(self) -> Generation | None:
        """How its answers are sampled; None where it needs none."""
        chosen = self.suite.win_rate or self.suite.samples
        return None if chosen is None else chosen.generation


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihood of one response: summed over its tokens."""

    logp: float
    tokens: int


@dataclass(frozen=True)
class Spoken:
    """An answer as text."""

    text: str
    tokens: int
    finished: bool


@dataclass
class Measured:
    """What one model did."""

    name: str
    tokenizer_digest: str
    path: str = ""
    """How likelihoods were computed: `fast` or `plain`."""
    path_reason: str = ""
    """Why so."""
    likelihoods: dict[int, dict[str, list[Likelihood]]] = field(default_factory=dict)
    """Suite index → row id → one per response, in the order of the row's roles (answer; or chosen, rejected)."""
    answers: dict[int, dict[str, Spoken]] = field(default_factory=dict)
    """Suite index → row id → answer."""
    truncated: dict[int, int] = field(default_factory=dict)
    """Suite index → rows that were cut at the model's longest sequence."""
    dropped: dict[int, int] = field(default_factory=dict)
    """Suite index → rows that do not fit the model at all."""
    tokens: int = 0
    """Tokens that went through the model."""


def choose_prompts(rows: Iterable[Row], limit: int, seed: int) -> tuple[Row, ...]:
    """At most `limit` rows with different prompts, by a hash of prompt and seed.

    A smaller limit gives a beginning of what a larger one gives, so that suites over one dataset share answers.
    """
    first: dict[str, Row] = {}
    for row in rows:
        if row.prompt:
            first.setdefault(row.group, row)
    return tuple(sorted(first.values(), key=lambda row: _rank(row.group, seed))[:limit])


def choose_rows(rows: Iterable[Row], limit: int | None, seed: int) -> tuple[Row, ...]:
    """All rows in their order, or `limit` of them by a hash of row and seed."""
    found = tuple(rows)
    if limit is None or len(found) <= limit:
        return found
    kept = {row.id for row in sorted(found, key=lambda row: _rank(row.id, seed))[:limit]}
    return tuple(row for row in found if row.id in kept)


def measure(
    policy: Policy,
    name: str,
    suites: Sequence[SuiteRows],
    *,
    seed: int,
    tokens_per_batch: int,
    precision: str,
    ranks: Ranks,
    at_share: Callable[[float], None],
) -> Measured:
    """Run every suite's model work.

    Args:
        policy: in evaluation mode on the ranks' device.
        name: what people call it.
        suites: with their rows.
        seed: of sampled answers.
        tokens_per_batch: budget of a forward pass.
        precision: of activations.
        ranks: processes that share the work; each gets everything.
        at_share: told the share of the work that is done; it may raise to stop.

    Raises:
        InputError: if no row of a suite fits the model.
    """
    policy.model.eval()
    measured = Measured(name, policy.tokenizer.digest)
    scored = {item.index: _encode(policy, item) for item in suites if item.generation is None}
    asked = _questions(policy, suites)
    work = sum(_scored_tokens(encoded.rows) for encoded in scored.values())
    work += sum(ANSWER_WEIGHT * len(rows) * generation.max_new_tokens for generation, rows in asked.items())
    done = 0

    def share_of(size: int) -> Callable[[float], None]:
        before = done
        return lambda share: at_share((before + share * size) / max(work, 1))

    if scored:
        scorer = Scorer(policy.model, precision=precision)
        scorer.eval()
        first = next(iter(scored.values())).rows
        choice = choose_path(scorer, first, {}, tokens=tokens_per_batch, ranks=ranks)
        scorer.path = measured.path = choice.path
        measured.path_reason = choice.reason
    for index, encoded in scored.items():
        size = _scored_tokens(encoded.rows)
        measured.likelihoods[index] = _score(
            scorer,
            encoded.rows,
            tokens_per_batch=tokens_per_batch,
            precision=precision,
            ranks=ranks,
            at_share=share_of(size),
        )
        measured.truncated[index], measured.dropped[index] = encoded.truncated, encoded.dropped
        measured.tokens += size
        done += size
    answers: dict[_Question, Spoken] = {}
    for generation, questions in asked.items():
        size = ANSWER_WEIGHT * len(questions) * generation.max_new_tokens
        said = _answer(policy, questions, generation, seed=seed, ranks=ranks, at_share=share_of(size))
        answers |= said
        measured.tokens += sum(len(ids) for ids in questions.values()) + sum(answer.tokens for answer in said.values())
        done += size
    for item in suites:
        if item.generation is not None:
            found = {row.id: answers.get(_question(item, row)) for row in item.rows}
            measured.answers[item.index] = {row_id: answer for row_id, answer in found.items() if answer is not None}
            measured.dropped[item.index] = len(found) - len(measured.answers[item.index])
    return measured


def longest_sequence(policy: Policy) -> int:
    """Tokens that the model was made for."""
    return int(getattr(policy.model.config.get_text_config(), "max_position_embeddings", None) or CONTEXT_DEFAULT)


@dataclass(frozen=True)
class _Question:
    """A prompt and how it is to be answered; equal ones of several suites are answered once."""

    dataset: str
    split: str
    row_id: str
    generation: Generation


def _question(item: SuiteRows, row: Row) -> _Question:
    assert item.generation is not None
    return _Question(item.suite.dataset, str(item.suite.value.split), row.id, item.generation)


def _questions(policy: Policy, suites: Sequence[SuiteRows]) -> dict[Generation, dict[_Question, list[int]]]:
    """Prompts as ids by the way they are answered: those of all suites share batches, since full ones are faster."""
    found: dict[Generation, dict[_Question, list[int]]] = {}
    for item in suites:
        if item.generation is not None:
            rows = {row.id: row for row in item.rows}
            questions = found.setdefault(item.generation, {})
            for encoded in _ask(policy, item).rows:
                questions.setdefault(_question(item, rows[encoded.row_id]), encoded.prompt)
    return found


def _encode(policy: Policy, item: SuiteRows) -> EncodedRows:
    method = "preference" if item.kind == "preferenceAccuracy" else "completion"
    return encode_rows(item.rows, policy.tokenizer, method=method, max_length=longest_sequence(policy))  # type: ignore[arg-type]


def _ask(policy: Policy, item: SuiteRows) -> EncodedRows:
    assert item.generation is not None
    room = longest_sequence(policy) - item.generation.max_new_tokens
    if room < 1:
        raise InputError(
            f"suites[{item.index}].{item.kind}.generation.maxNewTokens: {item.generation.max_new_tokens:,} leaves no "
            f"room for a prompt: the model takes {longest_sequence(policy):,} tokens"
        )
    return encode_rows(item.rows, policy.tokenizer, method="prompt", max_length=room)


def _score(
    scorer: Scorer,
    rows: Sequence[Encoded],
    *,
    tokens_per_batch: int,
    precision: str,
    ranks: Ranks,
    at_share: Callable[[float], None],
) -> dict[str, list[Likelihood]]:
    scores = score_rows(
        scorer,
        rows,
        tokens_per_batch=tokens_per_batch,
        device=scorer.model.device,
        precision=precision,
        ranks=ranks,
        at_batch=lambda batch, batches: at_share(batch / max(batches, 1)),
    )
    found: dict[str, list[Likelihood]] = {}
    for row, responses in zip(rows, scores, strict=True):
        for response, values in zip(row.responses, responses, strict=True):
            scored = [k for k, wanted in enumerate(response.mask) if wanted and (k > 0 or row.prompt)]
            found.setdefault(row.row_id, []).append(Likelihood(float(values[scored].double().sum()), len(scored)))
    return found


def _answer(
    policy: Policy,
    questions: dict[_Question, list[int]],
    generation: Generation,
    *,
    seed: int,
    ranks: Ranks,
    at_share: Callable[[float], None],
) -> dict[_Question, Spoken]:
    answers = generate(
        policy.model,
        policy.tokenizer,
        [Prompt(question.row_id, ids) for question, ids in questions.items()],
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        seed=seed,
        ranks=ranks,
        at_step=at_share,
    )
    return {
        question: Spoken(policy.tokenizer.decode(answer.ids).strip(), len(answer.ids), answer.finished)
        for question, answer in zip(questions, answers, strict=True)
    }


def _scored_tokens(rows: Sequence[Encoded]) -> int:
    return sum(len(row.prompt) + sum(len(response.ids) for response in row.responses) for row in rows)


def _rank(text: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}/{text}".encode()).hexdigest()
