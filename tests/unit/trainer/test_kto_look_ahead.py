"""KTO's look-ahead: mismatched answers behind the prompts of the first micro-batches, exact at any cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.methods import Kto
from plumbline_trainer.data.encode import Encoded, EncodedResponse
from plumbline_trainer.engine.ahead import FirstBatches
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.packing import PackedBatch, keeping, pack, packed_length
from plumbline_trainer.engine.references import References
from plumbline_trainer.engine.schedule import cut_step
from plumbline_trainer.engine.scorer import Path as ScorerPath
from plumbline_trainer.engine.scorer import Scorer, prepare_modes
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.engine.unpaired import DesirableAnswers, mismatched_rows
from support.encoded import make_pair
from support.peer import LossCurve
from support.tiny import STYLES, Style, make_model

CPU = torch.device("cpu")
WHOLE, PARTS = 4096, 64


def rows_of(count: int, *, pairs: bool, seed: int = 3) -> list[Encoded]:
    """Rows of all kinds: every third one has no prompt of its own, its answer begins with the dialogue before it."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        row = make_pair(rng, rng.randint(1, 20), rng.randint(1, 30), rng.randint(1, 30), f"{number}")
        taken = row.responses if pairs else row.responses[number % 2 :][:1]
        roles = {"chosen": "desirable", "rejected": "undesirable"}
        responses = [EncodedResponse(r.ids, r.mask, roles[r.role]) for r in taken]  # type: ignore[index, arg-type]
        if number % 3:
            found.append(Encoded(f"{number}", "g", row.prompt, responses))
            continue
        before = len(row.prompt)
        whole = [EncodedResponse([*row.prompt, *r.ids], [False] * before + r.mask, r.role) for r in responses]
        found.append(Encoded(f"{number}", "g", [], whole))
    return found


def first_batches(scorer: Scorer, rows: list[Encoded], budget: int, ranks: Ranks | None = None) -> FirstBatches:
    """The first micro-batch through the model, with gradient."""
    ranks = ranks or Ranks()
    members = [share[0] for share in cut_step([packed_length(row) for row in rows], budget=budget, ranks=ranks.size)]
    batch = keeping(pack([rows[index] for index in members[ranks.rank]]))
    scores = scorer(batch)
    assert scores.requires_grad
    return FirstBatches(scorer, ranks, batch, members, budget)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("budget", [WHOLE, PARTS])
def test_equals_a_pass_over_whole_rows(style: Style, pairs: bool, budget: int) -> None:
    rows = rows_of(9, pairs=pairs)
    others = mismatched_rows(rows, 64)
    scorer = Scorer(make_model(style, seed=1).requires_grad_(True))
    first = first_batches(scorer, rows, budget)
    assert len(first.rows) == 9 if budget == WHOLE else 0 < len(first.rows) < 9
    chosen = list(first.rows)
    wanted = score_rows(scorer, [others[index] for index in chosen], tokens_per_batch=budget, device=CPU)
    for found, answers in zip(first.totals(others), wanted, strict=True):
        assert not found.requires_grad
        assert found.tolist() == pytest.approx([float(tokens.sum()) for tokens in answers], rel=1e-5, abs=1e-5)


class TokenCounter(Scorer):
    """Counts the tokens that go through the model."""

    tokens = 0

    def forward(self, batch: PackedBatch, smoothing: float = 0.0) -> Any:
        self.tokens += batch.tokens
        return super().forward(batch, smoothing)


@pytest.mark.parametrize("pairs", [False, True])
def test_mismatched_answers_cost_their_own_tokens_and_one_of_the_prompt(pairs: bool) -> None:
    rows = [row for row in rows_of(9, pairs=pairs) if row.prompt]
    others = mismatched_rows(rows, 64)
    scorer = TokenCounter(make_model(seed=1).requires_grad_(True))
    first = first_batches(scorer, rows, WHOLE)
    scorer.tokens = 0
    first.totals(others)
    # The last token of an answer is predicted, never read.
    assert scorer.tokens == sum(1 + sum(len(answer.ids) - 1 for answer in row.responses) for row in others)


def test_a_pass_takes_no_more_tokens_than_the_budget() -> None:
    """Few tokens of prompts may be followed by many of answers."""
    rows = rows_of(9, pairs=False)
    others = mismatched_rows(rows, 64)
    scorer = Scorer(make_model(seed=1).requires_grad_(True))
    first = first_batches(scorer, rows, WHOLE)
    taken: list[int] = []
    real = scorer.forward
    scorer.forward = lambda batch, smoothing=0.0: (taken.append(batch.tokens), real(batch, smoothing))[1]  # type: ignore[method-assign]
    tight = FirstBatches(scorer, first.ranks, first.batch, first.members, budget=40)
    found = tight.totals(others)
    assert len(taken) > 1
    assert max(taken) <= 40
    wanted = score_rows(scorer, [others[index] for index in range(9)], tokens_per_batch=WHOLE, device=CPU)
    by_row = dict(zip(first.members[0], found, strict=True))
    for index, answers in enumerate(wanted):
        assert by_row[index].tolist() == pytest.approx([float(tokens.sum()) for tokens in answers], rel=1e-5, abs=1e-5)


def test_the_plain_path_lends_nothing() -> None:
    rows = rows_of(4, pairs=False)
    scorer = Scorer(make_model(seed=1).requires_grad_(True), path="plain")
    assert first_batches(scorer, rows, WHOLE).rows == []


class Noted(DesirableAnswers):
    """Notes every reference point."""

    points: list[float]

    def look_ahead(self, rows: Sequence[Encoded], first: FirstBatches | None = None) -> None:
        super().look_ahead(rows, first)
        self.points.append(float(self.point))


@pytest.mark.parametrize("path", ["fast", "plain"])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_training_is_the_same_at_every_cut(tmp_path: Path, path: ScorerPath, recomputed: bool, pairs: bool) -> None:
    """Whole steps in one micro-batch, and in several; with activations that the backward pass computes again, too."""
    rows = rows_of(12, pairs=pairs)
    curves = []
    for budget in (WHOLE, PARTS):
        parameters = Kto.model_validate(
            {
                "dataset": "d",
                "beta": 0.5,
                "training": {"globalBatch": 4, "tokensPerBatch": budget, "learningRate": 3e-3, "epochs": 2},
            }
        )
        scorer = Scorer(make_model(seed=1).requires_grad_(True), path=path)
        curve = LossCurve(tmp_path / f"{budget}", scorer.model, rows, parameters.training, scorer)
        scorer.path = curve.run.state.path = path
        plan = curve.run.plan
        steps = [[rows[index] for index in plan.rows(step)] for step in range(plan.steps)]
        needed = [row for step in steps for row in (*step, *mismatched_rows(step, parameters.training.max_length))]
        references = References(needed, score_rows(make_model(seed=1), needed, tokens_per_batch=512, device=CPU))
        prepare_modes(scorer, adapter_dropout=False, gradient_checkpointing=recomputed)

        def score(others: Any, scorer: Scorer = scorer, budget: int = budget) -> Any:
            return score_rows(scorer, others, tokens_per_batch=budget, device=CPU)

        objective, points = Noted(references, score, parameters), list[float]()
        objective.points = points
        curves.append((curve.train(objective), points))
    (whole, points), (parts, others) = curves
    assert max(points) > 0.1, "the point must move, or it says nothing"
    assert whole == pytest.approx(parts, rel=1e-4)
    assert points == pytest.approx(others, rel=1e-4, abs=1e-5)
