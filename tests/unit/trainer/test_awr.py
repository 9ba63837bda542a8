"""Advantage-weighted regression: weights from scores, the objective against its formula, the stage against sft."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.methods import Awr
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.loop import dummy_of
from plumbline_trainer.engine.objective import TokenLikelihood
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.scorer import Path as ForwardPath
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.weighted import WeightedAnswers, weigh_answers
from plumbline_trainer.errors import InputError
from safetensors.torch import load_file
from support import tiny
from support.encoded import make_ranked
from support.preferences import adapted_model, token_log_probabilities
from support.preflighting import pairs, pipeline, preflight
from support.tiny import STYLES, Style
from support.trainer import manifest_of, output_folder, run_in_process, write_jsonl
from support.training_data import rows_of, training_run

LORA = {"rank": 4}


def awr(**fields: Any) -> Awr:
    return Awr.model_validate({"dataset": "data", **fields})


def scored_row(group: str, scores: list[float], *, prompt: int = 5, weight: float = 1.0, seed: int = 0) -> Encoded:
    rng = random.Random(f"{group}/{seed}")
    row = make_ranked(rng, prompt, [rng.randint(1, 9) + (prompt == 0) for _ in scores], weight=weight)
    responses = [
        dataclasses.replace(response, score=score, reads=())
        for response, score in zip(row.responses, scores, strict=True)
    ]
    return dataclasses.replace(row, group=group, responses=responses)


def weights_in(rows: list[Encoded]) -> list[float]:
    return [response.weight for row in rows for response in row.responses]


class TestWeights:
    def test_by_hand(self) -> None:
        """Prompts a (in two rows) and b have V = 2 and 5, the single answers of c and d that of all ten: 3.

        A = −1, 0, 1; −2, 0, 0, 0, 2; −3 and 1. Without scaling and with β = 2 the weights are e^(A/2).
        """
        rows = [
            scored_row("a", [1, 2]),
            scored_row("b", [3, 5, 5, 5, 7]),
            scored_row("a", [3], seed=1),
            scored_row("c", [0]),
            scored_row("d", [4]),
        ]
        rows[4] = scored_row("d", [30 - 26 - 5 + 0.0])  # all scores sum to 30: 1 + 2 + 25 + 3 + 0 − 1
        found = weigh_answers(rows, [], awr(beta=2, scoreScale="none"))
        advantages = [-1, 0, -2, 0, 0, 0, 2, 1, -3, -4]
        assert weights_in(found.rows) == pytest.approx([math.exp(a / 2) for a in advantages])
        assert found.figures["answers"] == 10
        assert found.figures["scoreMean"] == 3
        assert found.figures["clippedWeights"] == 0

    def test_scaled_and_clipped_by_hand(self) -> None:
        """A = ±3 has the root mean square 3, so that β = 0.25 gives e^±4; 54.6 is cut at 10."""
        found = weigh_answers([scored_row("a", [1, 7])], [], awr(beta=0.25, weightClip=10))
        assert weights_in(found.rows) == pytest.approx([math.exp(-4), 10.0])
        assert found.figures["advantageScale"] == 3
        assert found.figures["clippedWeights"] == 0.5
        total = 10 + math.exp(-4)
        assert found.figures["effectiveAnswers"] == pytest.approx(total**2 / (100 + math.exp(-8)))

    def test_an_expectile_near_one_leaves_only_the_best_at_one(self) -> None:
        found = weigh_answers([scored_row("a", [0, 1, 4])], [], awr(expectile=1 - 1e-9, beta=0.01))
        assert weights_in(found.rows) == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)

    def test_held_out_prompts_have_their_own_baseline_and_the_training_rows_scale(self) -> None:
        rows = [scored_row("a", [0, 4]), scored_row("b", [9])]  # V = 2 and 13/3; A = −2, 2, 14/3
        scale = math.sqrt((4 + 4 + (14 / 3) ** 2) / 3)
        found = weigh_answers(rows, [scored_row("c", [10, 12]), scored_row("d", [5])], awr())
        wanted = [-1 / scale, 1 / scale, (5 - 13 / 3) / scale]
        assert weights_in(found.held_out) == pytest.approx([math.exp(a) for a in wanted])

    def test_nothing_to_learn_is_refused(self) -> None:
        with pytest.raises(InputError, match="none is better than another"):
            weigh_answers([scored_row("a", [0.1, 0.1, 0.1]), scored_row("b", [0.1])], [], awr(expectile=0.7))


def measured_rows() -> list[Encoded]:
    """Uneven rows of uneven weight, one without a prompt, weighed by hand-made factors."""
    rows = [
        scored_row("a", [1, 2, 0], prompt=20),
        scored_row("b", [3], prompt=3, weight=0.5),
        scored_row("c", [1, 5], prompt=0, weight=2.0),
    ]
    return weigh_answers(rows, [], awr(beta=0.7)).rows


def measure(model: Any, rows: list[Encoded], path: ForwardPath) -> tuple[float, torch.Tensor]:
    scorer, objective, batch = Scorer(model, path=path), WeightedAnswers(clip=20.0), pack(rows)
    scorer.eval()
    loss = objective.sums(batch, scorer(batch))["loss"] / sum(objective.size(row) for row in rows)
    return loss.item(), gradient_of(loss, model)


def gradient_of(loss: torch.Tensor, model: Any) -> torch.Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([gradient.reshape(-1) for gradient in torch.autograd.grad(loss, trained)])


class TestObjective:
    def test_loss_and_gradient_are_the_papers(self) -> None:
        model, rows = adapted_model("llama"), measured_rows()
        loss, gradient = measure(model, rows, "fast")
        total, tokens = torch.zeros(()).double(), 0.0
        for row in rows:
            for index, response in enumerate(row.responses):
                logs = token_log_probabilities(model, row, index)[len(row.prompt) :]
                own = torch.tensor(response.mask) & (torch.arange(len(logs)) > (-1 if row.prompt else 0))
                total = total - row.weight * response.weight * logs[own].sum()
                tokens += row.weight * int(own.sum())
        wanted = total / tokens
        assert loss == pytest.approx(wanted.item(), rel=1e-5)
        exact = gradient_of(wanted, model)
        assert (gradient - exact).norm() <= 2e-5 * exact.norm()

    @pytest.mark.parametrize("style", STYLES)
    def test_fast_equals_plain(self, style: Style) -> None:
        model, rows = adapted_model(style), measured_rows()
        (loss, gradient), (other, plain) = (measure(model, rows, path) for path in ("fast", "plain"))
        assert loss == pytest.approx(other, rel=1e-5)
        assert (gradient - plain).norm() <= 1e-5 * plain.norm()

    def test_micro_batches_add_up(self) -> None:
        model, rows, objective = adapted_model("llama"), measured_rows(), WeightedAnswers(clip=20.0)
        scorer = Scorer(model)
        with torch.no_grad():
            whole = objective.sums(pack(rows), scorer(pack(rows)))
            parts = [pack([row]) for row in (rows[0], dummy_of(rows[0]), *rows[1:])]
            found = [objective.sums(batch, scorer(batch)) for batch in parts]
        for figure, value in whole.items():
            assert sum(float(part[figure]) for part in found) == pytest.approx(float(value), rel=1e-5), figure

    def test_equal_weights_are_the_likelihood(self) -> None:
        rows = [
            dataclasses.replace(row, responses=[dataclasses.replace(r, weight=1.0) for r in row.responses])
            for row in measured_rows()
        ]
        scores, batch = torch.randn(len(pack(rows).targets)), pack(rows)
        mine = WeightedAnswers(clip=20.0).sums(batch, scores)
        assert mine["loss"] == mine["sftLoss"] == TokenLikelihood().sums(batch, scores)["loss"]
        assert mine["weight"] == sum(TokenLikelihood().size(row) for row in rows)


def weights_of(folder: Path, **stage: Any) -> dict[str, torch.Tensor]:
    run = training_run(folder, **stage)
    result, code = run_in_process(folder, run)
    assert code == 0, result.message
    return load_file(next(output_folder(run).glob("*.safetensors")))


def test_as_beta_grows_it_becomes_sft(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lora": LORA, "form": "scored", "globalBatch": 4, "learningRate": 3e-3, "maxSteps": 5}
    likely = weights_of(tmp_path, type_="sft", **settings)
    far = weights_of(tmp_path, type_="awr", stage={"beta": 1e6}, **settings)
    near = weights_of(tmp_path, type_="awr", stage={"beta": 0.5}, **settings)
    for name, tensor in likely.items():
        assert torch.allclose(tensor, far[name], atol=1e-6), name
    assert any(not torch.allclose(tensor, near[name], atol=1e-4) for name, tensor in likely.items())


def test_it_imitates_what_scored_best(tmp_path: Path) -> None:
    """Every prompt has a good and a bad answer: the good one gets likely and the bad one falls behind."""
    words = {"good": "plumb", "bad": "wall"}
    both = [
        {"prompt": f"{n}: which?", "completions": [{"text": words["bad"], "score": 0}, {"text": words["good"], "score": 1}]}
        for n in range(12)
    ]  # fmt: skip
    write_jsonl(tmp_path / "rankedScores-12.jsonl", both)
    run = training_run(
        tmp_path,
        "awr",
        lora=LORA,
        form="rankedScores",
        rows=12,
        stage={"beta": 0.1},
        globalBatch=12,
        epochs=12,
        learningRate=1e-2,
    )
    result, code = run_in_process(tmp_path, run)
    assert code == 0, result.message
    lines = [json.loads(line) for line in (tmp_path / "scratch" / "metrics.jsonl").read_text().splitlines()]
    first, last = (line["metrics"] for line in (lines[0], lines[-1]))
    # Bad answers weigh next to nothing and good ones 20, so that loss ÷ 20 is the good ones' part of sftLoss.
    before, after = ([line["loss"] / 20, line["sftLoss"] - line["loss"] / 20] for line in (first, last))
    assert after[0] < 0.5 * before[0], (before, after)
    assert after[1] - after[0] > before[1] - before[0], "the bad answer falls behind"
    metrics = manifest_of(run).metrics
    assert metrics["answers"] == 24
    assert metrics["effectiveAnswers"] == pytest.approx(12, rel=1e-3)
    assert metrics["clippedWeights"] == 0.5


@pytest.mark.parametrize("form", ["ranked", "scored"])
def test_answers_without_scores_are_refused_with_line_and_remedy(tmp_path: Path, form: str) -> None:
    rows = rows_of("rankedScores" if form == "ranked" else "scored", 8)
    if form == "ranked":
        rows[5]["completions"] = [item["text"] for item in rows[5]["completions"]]
    else:
        rows[5]["score"] = None
    write_jsonl(tmp_path / "q.jsonl", rows)
    write_jsonl(tmp_path / "p.jsonl", pairs())
    model = tiny.save_model(tmp_path / "model")
    stage = {"dataset": "q", "training": {"maxLength": 64}}
    made = pipeline(tmp_path, model, [{"name": "offline", "awr": stage}], split={"test": 0}, format=form)
    result, code = preflight(made)
    assert code == 2
    assert "line 6" in result.message
    if form == "ranked":
        assert result.message.startswith('spec.stages[0].awr.dataset: "q" has answers without a score')
        assert "Give every answer one: {prompt, completion, score} a row, or {text, score}" in result.message


def test_preflight_lets_scored_rows_pass_and_estimates_them(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "q.jsonl", rows_of("rankedScores", 12))
    write_jsonl(tmp_path / "p.jsonl", pairs())
    model = tiny.save_model(tmp_path / "model")
    stage = {"dataset": "q", "training": {"maxLength": 64, "globalBatch": 4}}
    made = pipeline(tmp_path, model, [{"name": "offline", "awr": stage}], split={"test": 0})
    result, code = preflight(made)
    assert code == 0, result.message


def test_the_stage_itself_refuses_rows_without_scores(tmp_path: Path) -> None:
    run = training_run(tmp_path, "awr", lora=LORA, form="ranked", rows=6)
    result, code = run_in_process(tmp_path, run)
    assert code == 2
    assert "has answers without a score (" in result.message
    assert "line 1)" in result.message
