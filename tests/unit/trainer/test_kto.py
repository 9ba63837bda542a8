"""KTO: its loss by hand, its reference point over the global batch, its labels, and the stage as a whole."""

from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plumbline_api.methods import Kto
from plumbline_trainer.data.encode import Encoded, EncodedResponse
from plumbline_trainer.data.labels import LabelCounts, count_labels
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.references import References
from plumbline_trainer.engine.schedule import plan_steps
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.engine.unpaired import DesirableAnswers, mismatched_rows
from plumbline_trainer.losses.kto import kto_loss, reference_point
from pydantic import ValidationError
from support.encoded import make_completion, make_pair
from support.ranks import run_ranks
from support.tiny import STYLES, Style, make_model
from support.trainer import manifest_of, output_folder, run_in_process, write_jsonl
from support.training_data import rows_of, training_run

LORA = {"rank": 4}


class TestLoss:
    def test_by_hand(self) -> None:
        """r = (2, −1), z = 0.5, β = 0.5: σ(−0.75) · λ_D and σ(0.5·(−1 − 0.5)) = σ(−0.75) · λ_U."""
        ratios = torch.tensor([2.0, -1.0], requires_grad=True)
        losses = kto_loss(
            ratios,
            torch.tensor([True, False]),
            torch.tensor(0.5),
            beta=0.5,
            desirable_weight=1.0,
            undesirable_weight=4 / 3,
        )
        low = 1 / (1 + math.exp(0.75))
        assert losses.tolist() == pytest.approx([low, 4 / 3 * low])
        losses.sum().backward()
        # d/dr λ_D·σ(−β(r − z)) = −λ_D·β·σ·(1 − σ); for the undesirable one with the other sign.
        slope = 0.5 * low * (1 - low)
        assert ratios.grad is not None
        assert ratios.grad.tolist() == pytest.approx([-slope, 4 / 3 * slope])

    def test_is_half_of_the_weight_where_policy_and_reference_agree(self) -> None:
        found = kto_loss(
            torch.zeros(2),
            torch.tensor([True, False]),
            torch.tensor(0.0),
            beta=0.1,
            desirable_weight=1.0,
            undesirable_weight=3.0,
        )
        assert found.tolist() == [0.5, 1.5]

    def test_value_and_gradient_against_the_formula_in_float64(self) -> None:
        rng = torch.Generator().manual_seed(1)
        ratios = (torch.randn(64, generator=rng) * 30).requires_grad_()
        desirable = torch.rand(64, generator=rng) < 0.5
        losses = kto_loss(ratios, desirable, torch.tensor(2.5), beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
        losses.sum().backward()
        exact = ratios.detach().double().requires_grad_()
        one_minus = 1 - 1 / (1 + torch.exp(-0.3 * torch.where(desirable, exact - 2.5, 2.5 - exact)))
        wanted = torch.where(desirable, 1.2, 0.7) * one_minus
        wanted.sum().backward()
        torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-7)
        assert ratios.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(ratios.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)

    def test_far_out_is_finite_and_exact(self) -> None:
        found = kto_loss(
            torch.tensor([1e4, -1e4]),
            torch.tensor([True, True]),
            torch.tensor(0.0),
            beta=1.0,
            desirable_weight=1.0,
            undesirable_weight=1.0,
        )
        assert found.tolist() == [0.0, 1.0]

    def test_reference_point_by_hand(self) -> None:
        assert reference_point(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0])).item() == pytest.approx(3.0)
        assert reference_point(torch.tensor([1.0, -4.0]), torch.tensor([1.0, 1.0])).item() == 0.0, "never below zero"
        policy = torch.tensor([1.0], requires_grad=True)
        assert not reference_point(policy, torch.ones(1)).requires_grad


class TestMismatchedPairs:
    """Trap 7 of the field: y′ = y on odd batches, after shuffling, or in a tail batch of one."""

    @settings(max_examples=100, deadline=None)
    @given(count=st.integers(2, 40), batch=st.integers(2, 17), seed=st.integers(0, 9), pairs=st.booleans())
    def test_no_row_gets_an_answer_of_its_own_in_any_step(self, count: int, batch: int, seed: int, pairs: bool) -> None:
        rng = random.Random(seed)
        rows = [
            make_pair(rng, 3, 2, 2, name=f"{n}") if pairs else make_completion(rng, 3, 2, name=f"{n}")
            for n in range(count)
        ]
        plan = plan_steps(
            [row.row_id for row in rows], seed=seed, global_batch=batch, epochs=2, max_steps=None, least=2
        )
        for step in range(plan.steps):
            taken = [rows[index] for index in plan.rows(step)]
            assert len(taken) >= 2
            others = mismatched_rows(taken, 64)
            for row, other in zip(taken, others, strict=True):
                assert other.prompt == row.prompt
                assert all(response not in row.responses for response in other.responses)
            given_out = [tuple(item.ids) for other in others for item in other.responses]
            assert sorted(given_out) == sorted(tuple(item.ids) for row in taken for item in row.responses), "each once"

    def test_pairing_is_a_function_of_seed_and_epoch(self) -> None:
        rng = random.Random(1)
        rows = [make_completion(rng, 3, 4, name=f"{n}") for n in range(9)]

        def pairing(seed: int, step: int) -> list[str]:
            plan = plan_steps([r.row_id for r in rows], seed=seed, global_batch=9, epochs=2, max_steps=None, least=2)
            return sorted(row.row_id for row in mismatched_rows([rows[index] for index in plan.rows(step)], 64))

        assert pairing(1, 0) == pairing(1, 0)
        assert pairing(1, 0) != pairing(2, 0)
        assert pairing(1, 0) != pairing(1, 1)

    def test_a_tail_of_one_row_joins_the_step_before(self) -> None:
        names = [f"{n}" for n in range(9)]
        plan = plan_steps(names, seed=1, global_batch=4, epochs=2, max_steps=None, least=2)
        assert [len(plan.rows(step)) for step in range(plan.steps)] == [4, 5, 4, 5]
        assert sorted(index for step in (2, 3) for index in plan.rows(step)) == list(range(9))

    def test_answers_are_cut_where_the_other_prompt_leaves_less_room(self) -> None:
        rng = random.Random(1)
        long, short = make_completion(rng, 50, 10, name="a"), make_completion(rng, 4, 40, name="b")
        first, second = mismatched_rows([long, short], 60)
        assert len(first.responses[0].ids) == len(first.responses[0].mask) == 10
        assert first.responses[0].ids == short.responses[0].ids[:10]
        assert second.responses[0].ids == long.responses[0].ids

    def test_an_unshared_row_gives_the_answer_without_its_prompt(self) -> None:
        whole = EncodedResponse([1, 2, 3, 4, 5], [False, False, False, True, True], "desirable")
        unshared = Encoded("u", "g", [], [whole])
        shared = Encoded("s", "g", [7, 8], [EncodedResponse([9], [True], "undesirable")])
        first, second = mismatched_rows([unshared, shared], 64)
        assert (first.prompt, first.responses[0].ids) == ([1, 2, 3], [9])
        assert (second.prompt, second.responses[0].ids) == ([7, 8], [4, 5])


class TestLabels:
    def test_counts_take_the_chosen_answer_as_desirable(self) -> None:
        assert count_labels(["chosen", "rejected", "desirable", None]) == LabelCounts(2, 1)

    @pytest.mark.parametrize(
        ("desirable", "undesirable", "weights", "range_"),
        [
            (3, 3, {}, None),
            (4, 3, {}, None),
            (5, 3, {}, "between 0.6 and 0.8"),
            (3, 4, {}, "between 1.33 and 1.78"),
            (3, 6, {"desirableWeight": 2}, None),
            (6, 3, {"undesirableWeight": 2}, None),
            (3, 3, {"undesirableWeight": 2}, "between 2 and 2.67"),
        ],
    )
    def test_weights_outside_one_to_four_thirds_are_warned_about(
        self, desirable: int, undesirable: int, weights: dict[str, float], range_: str | None
    ) -> None:
        advice = LabelCounts(desirable, undesirable).advice(Kto.model_validate({"dataset": "d", **weights}))
        assert advice is None if range_ is None else advice is not None and range_ in advice

    def test_one_sided_sets_are_refused_with_what_is_missing(self) -> None:
        assert "label false" in str(LabelCounts(4, 0).one_sided)
        assert "label true" in str(LabelCounts(0, 4).one_sided)
        assert LabelCounts(1, 1).one_sided is None

    def test_a_batch_of_one_is_refused(self) -> None:
        with pytest.raises(ValidationError, match="greater than or equal to 2"):
            Kto.model_validate({"dataset": "d", "training": {"globalBatch": 1}})


def objective_of(model: Any, rows: list[Encoded], **fields: Any) -> DesirableAnswers:
    """KTO on ready rows; the reference is another model, so that ratios are not zero."""
    parameters = Kto.model_validate({"dataset": "d", **fields})
    needed = [*rows, *mismatched_rows(rows, parameters.training.max_length)]
    cpu = torch.device("cpu")
    references = References(needed, score_rows(make_model(seed=9), needed, tokens_per_batch=256, device=cpu))
    score = partial(score_rows, model, tokens_per_batch=parameters.training.token_budget, device=cpu)
    return DesirableAnswers(references, score, parameters)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("pairs", [False, True])
def test_fast_equals_plain(style: Style, pairs: bool) -> None:
    rng = random.Random(3)
    roles = ["desirable", "undesirable"]
    rows: list[Encoded] = []
    for number in range(5):
        row = make_pair(rng, rng.randint(2, 20), rng.randint(1, 9), rng.randint(1, 9))
        kept = row.responses if pairs else row.responses[number % 2 :][:1]
        given_roles = roles if pairs else [roles[number % 2]]
        responses = [EncodedResponse(r.ids, r.mask, role) for r, role in zip(kept, given_roles, strict=True)]  # type: ignore[arg-type]
        rows.append(Encoded(f"{number}", "g", row.prompt, responses))
    found = []
    model = make_model(style, seed=1).requires_grad_(True)
    for path in ("fast", "plain"):
        scorer = Scorer(model, path=path)  # type: ignore[arg-type]
        scorer.eval()
        objective = objective_of(scorer, rows, beta=0.05)
        objective.look_ahead(rows)
        batch = pack(rows)
        model.zero_grad()
        sums = objective.sums(batch, scorer(batch))
        (sums["loss"] / len(rows)).backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        found.append((sums["loss"].item(), objective.point.item(), gradient))
    (loss, point, gradient), (other, other_point, plain) = found
    assert loss == pytest.approx(other, rel=1e-5)
    assert point == pytest.approx(other_point, rel=1e-5)
    assert (gradient - plain).norm() <= 1e-5 * plain.norm()


def test_figures_are_means_over_their_kind() -> None:
    rng = random.Random(3)
    rows = [
        Encoded(f"{n}", "g", [1, 2], [EncodedResponse([rng.randrange(99)], [True], role)])  # type: ignore[arg-type]
        for n, role in enumerate(["desirable", "desirable", "undesirable"])
    ]
    scorer = Scorer(make_model(seed=1))
    objective = objective_of(scorer, rows, beta=0.5)
    objective.look_ahead(rows)
    with torch.no_grad():
        parts = [objective.sums(pack([row]), scorer(pack([row]))) for row in rows]
        whole = objective.sums(pack(rows), scorer(pack(rows)))
    for name in whole:
        assert float(sum(part[name] for part in parts)) == pytest.approx(float(whole[name]), rel=1e-4, abs=1e-6), name
    own = objective.references.of(rows)
    ratios = [float(scorer(pack([row])).detach().sum() - total) for row, total in zip(rows, own, strict=True)]
    assert float(whole["rewardDesirable"]) / 3 == pytest.approx(0.5 * (ratios[0] + ratios[1]) / 2, rel=1e-4)
    assert float(whole["rewardUndesirable"]) / 3 == pytest.approx(0.5 * ratios[2], rel=1e-4)
    assert float(whole["kl"]) / 3 == pytest.approx(float(objective.point))


class TestStage:
    @pytest.mark.parametrize("form", ["unpaired", "preference"])
    @pytest.mark.parametrize("lora", [LORA, None])
    def test_learns_from_both_formats(self, tmp_path: Path, form: str, lora: dict[str, Any] | None) -> None:
        run = training_run(
            tmp_path, "kto", form=form, lora=lora, evaluation=0.25, globalBatch=5, epochs=6, learningRate=3e-3
        )
        result, code = run_in_process(tmp_path, run)
        assert code == 0, result.message
        metrics = manifest_of(run).metrics
        assert metrics["evalLossStart"] == pytest.approx(0.5, abs=1e-4)
        assert metrics["loss"] < 0.49
        assert metrics["rewardAccuracy"] > 0.5
        assert metrics["plainPath"] == 0

    @pytest.mark.parametrize("form", ["unpaired", "preference"])
    def test_reference_point_and_weights_are_the_same_for_1_2_and_4_ranks_and_any_accumulation(
        self, tmp_path: Path, form: str
    ) -> None:
        results = []
        for processes, budget in ((1, 4096), (1, 64), (2, 128), (4, 64)):
            folder = tmp_path / f"{processes}-{budget}"
            run = training_run(
                folder,
                "kto",
                form=form,
                lora=LORA,
                rows=15,
                evaluation=0.2,
                globalBatch=5,
                epochs=3,
                learningRate=1e-3,
                tokensPerBatch=budget,
                processes=processes,
            )
            run_ranks(folder, run)
            curve = (folder / "scratch" / "metrics.jsonl").read_text()
            results.append((curve, weights_of(run)))
        first, weights = results[0]
        points = [line["metrics"]["kl"] for line in lines_of(first) if "kl" in line["metrics"]]
        assert any(point > 0 for point in points), "the point must move, or it says nothing"
        for other, others in results[1:]:
            for one, two in zip(lines_of(first), lines_of(other), strict=True):
                for name in ("loss", "evalLoss"):
                    if name in one["metrics"]:
                        assert one["metrics"][name] == pytest.approx(two["metrics"][name], rel=1e-5)
                for name in ("kl", "evalKl"):
                    if name in one["metrics"]:
                        assert one["metrics"][name] == pytest.approx(two["metrics"][name], rel=1e-3, abs=3e-6)
            total = sum(float(tensor.double().square().sum()) for tensor in weights.values())
            gap = sum(float((weights[name] - others[name]).double().square().sum()) for name in weights)
            assert math.sqrt(gap / total) <= 1e-5

    def test_one_sided_rows_are_refused(self, tmp_path: Path) -> None:
        rows = [{**row, "label": True} for row in rows_of("unpaired", 6)]
        write_jsonl(tmp_path / "unpaired-6.jsonl", rows)
        result, code = run_in_process(tmp_path, training_run(tmp_path, "kto", rows=6, lora=LORA))
        assert code == 2
        assert "only desirable answers" in result.message
        assert "sft" in result.message

    def test_a_single_usable_row_is_refused(self, tmp_path: Path) -> None:
        rows = rows_of("preference", 1)
        write_jsonl(tmp_path / "preference-1.jsonl", rows)
        result, code = run_in_process(tmp_path, training_run(tmp_path, "kto", form="preference", rows=1, lora=LORA))
        assert code == 2
        assert "one usable row in its train split" in result.message

    def test_a_batch_of_one_kind_only_is_no_obstacle(self, tmp_path: Path) -> None:
        rows = [{**row, "label": number > 0} for number, row in enumerate(rows_of("unpaired", 9))]
        write_jsonl(tmp_path / "unpaired-9.jsonl", rows)
        run = training_run(tmp_path, "kto", rows=9, lora=LORA, globalBatch=2, epochs=2, learningRate=1e-3)
        result, code = run_in_process(tmp_path, run)
        assert code == 0, result.message


def lines_of(text: str) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in text.splitlines()]


def weights_of(run: Any) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next(output_folder(run).glob("*.safetensors")))
