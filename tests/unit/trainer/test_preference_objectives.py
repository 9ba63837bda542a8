"""Preference objectives on a tiny model: the papers' losses, what counts how much, and fast equals plain."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from plumbline_trainer.data.encode import Encoded, encode_rows
from plumbline_trainer.data.formats import parse_record
from plumbline_trainer.data.records import Record
from plumbline_trainer.engine import logprobs
from plumbline_trainer.engine.packing import context_places, dummy_of, pack, packed_length
from plumbline_trainer.engine.preference import RankedResponses, pair_answers, share_in_order
from plumbline_trainer.engine.scorer import Path, Scorer
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.tokenizer import make_tokenizer
from support import tiny
from support.encoded import make_pair, make_ranked
from support.preferences import (
    PARAMETERS,
    adapted_model,
    dpo,
    loss_by_formula,
    objective_of,
    references_of,
    scores_context,
    token_log_probabilities,
)
from support.tiny import STYLES, Style

GAP = 1e-5


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * 384 * 16)


def rows_for(name: str) -> list[Encoded]:
    """Uneven rows of uneven weight; one has no prompt, and ranked ones have two to four responses."""
    rng = random.Random(7)
    if name == "rrhf":
        rows = [
            make_ranked(rng, prompt, lengths) for prompt, lengths in [(20, (9, 5)), (3, (4, 12, 1)), (0, (6, 9, 4, 7))]
        ]
    else:
        rows = [make_pair(rng, prompt, c, r) for prompt, c, r in [(20, 9, 5), (3, 1, 14), (31, 12, 12), (0, 8, 6)]]
    return [
        dataclasses.replace(row, weight=weight, score_context=scores_context(PARAMETERS[name]))
        for row, weight in zip(rows, [1.0, 0.5, 2.0, 1.0], strict=False)
    ]


def measure(name: str, model: Any, rows: list[Encoded], path: Path) -> tuple[float, torch.Tensor]:
    """Loss of the rows as one step, and its gradient."""
    scorer = Scorer(model, path=path)
    scorer.eval()
    objective = objective_of(PARAMETERS[name], references_of(model, rows))
    batch = pack(rows)
    loss = objective.sums(batch, scorer(batch))["loss"] / sum(objective.size(row) for row in rows)
    return loss.item(), gradient_of(loss, model)


def gradient_of(loss: torch.Tensor, model: Any) -> torch.Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([gradient.reshape(-1) for gradient in torch.autograd.grad(loss, trained)])


@pytest.mark.parametrize("name", PARAMETERS)
def test_loss_and_gradient_are_the_papers(name: str) -> None:
    model, rows = adapted_model("llama"), rows_for(name)
    loss, gradient = measure(name, model, rows, "fast")
    wanted = loss_by_formula(PARAMETERS[name], model, rows)
    assert loss == pytest.approx(wanted.item(), rel=GAP)
    exact = gradient_of(wanted, model)
    assert exact.norm() > 0
    assert (gradient - exact).norm() <= 2e-5 * exact.norm()


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("style", STYLES)
def test_fast_equals_plain(style: Style, name: str) -> None:
    model, rows = adapted_model(style), rows_for(name)
    (loss, gradient), (other, plain) = (measure(name, model, rows, path) for path in ("fast", "plain"))
    assert loss == pytest.approx(other, rel=GAP)
    assert (gradient - plain).norm() <= GAP * plain.norm()


@pytest.mark.parametrize("name", PARAMETERS)
def test_micro_batches_add_up(name: str) -> None:
    """One row at a time, with a dummy between, gives the figures of all rows at once."""
    model, rows = adapted_model("llama"), rows_for(name)
    scorer = Scorer(model)
    objective = objective_of(PARAMETERS[name], references_of(model, rows))
    with torch.no_grad():
        whole = objective.sums(pack(rows), scorer(pack(rows)))
        parts = [pack([row]) for row in (rows[0], dummy_of(rows[0]), *rows[1:])]
        found = [objective.sums(batch, scorer(batch)) for batch in parts]
    for figure, value in whole.items():
        total = sum(float(part[figure]) for part in found)
        assert total == pytest.approx(float(value), rel=1e-5, abs=1e-5), figure


@pytest.mark.parametrize("name", ["sigmoid", "conservative", "robust"])
def test_the_first_loss_is_ln_2(name: str) -> None:
    """Trap 9: policy and reference agree before the first step."""
    from plumbline_trainer.models.adapters import adapters_disabled

    model, rows = adapted_model("llama"), rows_for(name)
    objective = objective_of(PARAMETERS[name], references_of(model, rows))
    with torch.no_grad(), adapters_disabled(model):
        sums = objective.sums(pack(rows), Scorer(model)(pack(rows)))
    assert float(sums["loss"]) / 4.5 == pytest.approx(math.log(2), abs=1e-5)
    assert float(sums["rewardMargin"]) == pytest.approx(0.0, abs=1e-4)


def test_the_weight_of_a_record_reaches_the_loss() -> None:
    tokenizer = make_tokenizer(tiny.make_tokenizer())
    records = [
        {"prompt": "Name a fruit.", "chosen": "A plum.", "rejected": "A hammer, a saw and a level.", "w": 3},
        {"prompt": "Is it level?", "chosen": "Yes.", "rejected": "No, it is not.", "w": 0.5},
        {"prompt": "Who asks?", "chosen": "I do.", "rejected": "Nobody.", "w": 0},
    ]
    parsed = [parse_record(Record("f line 1", value), "preference", {"weight": "w"}) for value in records]
    rows = encode_rows(parsed, tokenizer, method="preference", max_length=128).rows
    assert [row.weight for row in rows] == [3.0, 0.5, 0.0]
    model = adapted_model("llama")
    loss, _ = measure("sigmoid", model, rows, "fast")
    alone = [measure("sigmoid", model, [dataclasses.replace(row, weight=1.0)], "fast")[0] for row in rows]
    assert alone[0] != pytest.approx(alone[1], rel=1e-2)
    assert loss == pytest.approx((3 * alone[0] + 0.5 * alone[1]) / 3.5, rel=1e-5)


def test_trap_4_an_answer_that_truncation_empties_is_dropped_and_ipo_stays_finite() -> None:
    tokenizer = make_tokenizer(tiny.make_tokenizer())
    pairs = [("Name a fruit.", "A plum.", "A hammer."), ("Is it level? " * 12, "Yes.", "No.")]
    parsed = [
        parse_record(Record(f"f line {n}", {"prompt": p, "chosen": c, "rejected": r}), "preference", {})
        for n, (p, c, r) in enumerate(pairs, 1)
    ]
    found = encode_rows(parsed, tokenizer, method="preference", max_length=40)
    assert (len(found.rows), found.dropped) == (1, 1)
    assert "f line 2: dropped" in found.examples[0]
    for name in ("ipo", "orpo", "simpo", "rrhf", "length-normalised"):
        rows = [dataclasses.replace(row, score_context=scores_context(PARAMETERS[name])) for row in found.rows]
        loss, gradient = measure(name, adapted_model("llama"), rows, "fast")
        assert math.isfinite(loss)
        assert torch.isfinite(gradient).all()
    with pytest.raises(InputError, match=r"Raise training\.maxLength"):
        encode_rows(parsed[1:], tokenizer, method="preference", max_length=40)


class TestContext:
    """What ORPO's likelihood over prompt and answer scores."""

    def test_prompt_and_turns_of_others_are_scored_once_each(self) -> None:
        row = dataclasses.replace(make_pair(random.Random(1), 5, 6, 3), score_context=True)
        mask = [True, True, False, False, True, True]
        row.responses[0] = dataclasses.replace(row.responses[0], mask=mask)
        assert context_places(row) == (1, 2, 3, 4, 7, 8)
        batch = pack([row])
        assert batch.context_tokens.tolist() == [6.0]
        assert batch.answer_tokens.tolist() == [4.0, 3.0]
        model = adapted_model("llama")
        with torch.no_grad():
            scores = Scorer(model)(batch)
            expected = token_log_probabilities(model, row, 0)
        assert float(batch.sum_by_context(scores)) == pytest.approx(float(expected[[1, 2, 3, 4, 7, 8]].sum()), rel=1e-5)
        assert float(batch.sum_by_answer(scores)[0]) == pytest.approx(float(expected[[5, 6, 9, 10]].sum()), rel=1e-5)

    def test_turns_of_others_at_the_end_go_through_the_model_too(self) -> None:
        """Truncation may end a dialogue within a turn that the response does not own."""
        row = make_pair(random.Random(1), 0, 6, 3)
        row.responses[0] = dataclasses.replace(row.responses[0], mask=[False, True, True, False, False, False])
        scored = dataclasses.replace(row, score_context=True)
        assert (packed_length(row), packed_length(scored)) == (2 + 2, 5 + 2)
        assert pack([scored]).tokens == 7
        assert context_places(scored) == (3, 4, 5)
        model = adapted_model("llama")
        with torch.no_grad():
            fast, plain = (Scorer(model, path=path)(pack([scored])) for path in ("fast", "plain"))
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)

    def test_rows_with_and_without_keep_apart(self) -> None:
        rng = random.Random(3)
        rows = [make_pair(rng, 7, 3, 4), dataclasses.replace(make_pair(rng, 4, 2, 2), score_context=True)]
        batch = pack(rows)
        assert batch.context_tokens.tolist() == [0.0, 3.0]
        values = torch.arange(float(len(batch.targets)))
        assert batch.sum_by_context(values).tolist() == [0.0, 11.0 + 12.0 + 13.0]
        assert batch.sum_by_answer(values).tolist() == [3.0, 18.0, 15.0, 19.0]

    def test_a_dummy_scores_no_context(self) -> None:
        row = dataclasses.replace(make_pair(random.Random(1), 5, 6, 3), score_context=True)
        assert pack([dummy_of(row)]).context_tokens.tolist() == [0.0]


def test_share_in_order_by_hand() -> None:
    # of (3, 1), (3, 1), (3, 4), (1, 1), (1, 4), (1, 4): two in order, one tie
    values = torch.tensor([3.0, 1.0, 1.0, 4.0])
    assert share_in_order(values, torch.arange(4)).item() == pytest.approx(2.5 / 6)
    # equal ranks ask for nothing: of (3, 1), (3, 4), (1, 1), (1, 4) one in order, one tie
    assert share_in_order(values, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(1.5 / 4)


def test_rrhf_figures_of_rows_with_different_numbers_of_responses() -> None:
    rows = rows_for("rrhf")
    model = adapted_model("llama")
    batch = pack(rows)
    with torch.no_grad():
        sums = RankedResponses(sft_weight=2.0).sums(batch, Scorer(model)(batch))
        means = [
            [
                float(
                    token_log_probabilities(model, row, index)[-len(response.ids) :][torch.tensor(response.mask)].mean()
                )
                for index, response in enumerate(row.responses)
            ]
            for row in rows
        ]
    leads = [row.weight * (found[0] - sum(found[1:]) / len(found[1:])) for row, found in zip(rows, means, strict=True)]
    assert float(sums["rewardMargin"]) == pytest.approx(sum(leads), rel=1e-5)
    assert float(sums["loss"]) == pytest.approx(float(sums["rankingLoss"] + 2 * sums["sftLoss"]), rel=1e-6)


def test_pairs_are_found_whatever_their_order() -> None:
    row = make_pair(random.Random(1), 4, 2, 3)
    swapped = dataclasses.replace(row, responses=row.responses[::-1])
    chosen, rejected = pair_answers(pack([row, swapped]))
    assert (chosen.tolist(), rejected.tolist()) == ([0, 3], [1, 2])


def test_length_normalised_rewards_are_means() -> None:
    model, rows = adapted_model("llama"), [make_pair(random.Random(4), 6, 8, 2)]
    references = references_of(model, rows)
    batch = pack(rows)
    with torch.no_grad():
        scores = Scorer(model)(batch)
        sums, means = (
            objective_of(dpo(lengthNormalized=normalised), references).sums(batch, scores)
            for normalised in (False, True)
        )
    assert float(means["rewardChosen"]) == pytest.approx(float(sums["rewardChosen"]) / 8, rel=1e-6)
    assert float(means["rewardRejected"]) == pytest.approx(float(sums["rewardRejected"]) / 2, rel=1e-6)
