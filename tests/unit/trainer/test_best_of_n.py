"""Best of n: who wins and what is said of it, the stage against sft on its winners, kills, ranks."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.stagerun import StageRun
from plumbline_trainer.data.documents import row_from_document, row_to_document
from plumbline_trainer.data.rows import Message, Response, Row
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.winners import (
    WINNER,
    answer_figures,
    gold_figures,
    mark_winners,
    refuse_no_winner,
    winning_rows,
)
from plumbline_trainer.errors import InputError, Interrupted
from plumbline_trainer.rewards.combining import RewardSet
from plumbline_trainer.rollout.huggingface import HuggingFaceRollout
from plumbline_trainer.stages import best_of_n
from plumbline_trainer.storage.checkpoints import wait_for_uploads
from safetensors.torch import load_file
from support.preflighting import pipeline, plan_of, preflight
from support.ranks import run_ranks
from support.trainer import manifest_of, output_folder, run_in_process, stage_context, write_jsonl
from support.training_data import training_run

LORA = {"rank": 4}
WORDS = ("plumb", "line", "wall", "stone")


def answer(number: int, score: float, text: str = "", *, finished: bool = True, gold: float | None = None) -> Response:
    annotations: dict[str, Any] = {"rewards": {"brief": 2 * score}}
    return Response(
        str(number),
        (Message("assistant", text or f"answer {number}"),),
        score=score,
        annotations=annotations if gold is None else annotations | {"gold": gold},
        policy_digest="d",
        sampling={"tokens": number + 1, "finished": finished},
    )


def row_of(*answers: Response, name: str = "r", prompt: str = "Q") -> Row:
    return Row(name, "g", (Message("user", prompt),), answers, source="f line 1")


def winners_of(row: Row, **settings: Any) -> list[str]:
    marked = mark_winners(row, **({"keep": 1, "min_score": None} | settings))
    return [item.id for item in marked.responses if item.label == WINNER]


class TestWinners:
    def test_the_best_of_each_prompt(self) -> None:
        row = row_of(answer(0, 1.0), answer(1, 3.0), answer(2, 2.0))
        assert winners_of(row) == ["1"]
        assert winners_of(row, keep=2) == ["1", "2"]
        assert [item.rank for item in mark_winners(row, keep=1, min_score=None).responses] == [2, 0, 1]

    def test_of_equal_scores_the_first_one_sampled(self) -> None:
        row = row_of(answer(0, 1.0), answer(1, 3.0), answer(2, 3.0))
        assert winners_of(row) == ["1"]
        assert [item.rank for item in mark_winners(row, keep=1, min_score=None).responses] == [1, 0, 0]

    def test_an_answer_without_an_end_never_wins(self) -> None:
        assert winners_of(row_of(answer(0, 1.0), answer(1, 3.0, finished=False)), keep=2) == ["0"]

    def test_equal_answers_win_once(self) -> None:
        row = row_of(answer(0, 3.0, "same"), answer(1, 3.0, "same"), answer(2, 1.0))
        assert winners_of(row, keep=2) == ["0", "2"]

    def test_a_threshold_holds_for_every_winner(self) -> None:
        row = row_of(answer(0, 1.0), answer(1, 3.0), answer(2, 2.0))
        assert winners_of(row, keep=3, min_score=2.0) == ["1", "2"]
        assert winners_of(row, min_score=3.5) == []

    def test_each_winner_is_a_row_of_its_own_best_first(self) -> None:
        marked = [mark_winners(row_of(answer(0, 1.0), answer(1, 3.0)), keep=2, min_score=None)] * 2
        found = winning_rows(marked)
        assert [row.chosen.id for row in found] == ["1", "0", "1", "0"]
        assert len({row.id for row in found}) == 4
        assert found[2].id == f"{found[0].id}-2"

    def test_why_there_is_no_winner(self) -> None:
        rows = [mark_winners(row_of(answer(0, 1.0), answer(1, 0.5)), keep=1, min_score=2.0)]
        with pytest.raises(InputError, match=r"scores 2\.0 or more; the best has 1\. Lower minScore"):
            refuse_no_winner(rows, 2.0)
        rows = [mark_winners(row_of(answer(0, 1.0, finished=False)), keep=1, min_score=None)]
        with pytest.raises(InputError, match=r"none of 1 sampled answers ends by itself.*Raise rollout\.maxNewTokens"):
            refuse_no_winner(rows, None)

    def test_figures_by_hand(self) -> None:
        """Scores 1, 3 (mean 2, σ 1) and 0, 4 (mean 2, σ 2), of which the 4 has no end: gains 3 − 2 and 0 − 2."""
        rows = [
            mark_winners(row_of(answer(0, 1.0), answer(1, 3.0), name="a"), keep=1, min_score=1.0),
            mark_winners(row_of(answer(2, 0.0), answer(3, 4.0, finished=False), name="b"), keep=1, min_score=1.0),
        ]
        assert answer_figures(rows) == {
            "rewardGain": -0.5,
            "reward": 2.0,
            "rewardBest": 1.5,
            "rewardSpread": 1.5,
            "winners": 1.0,
            "promptsWithoutWinner": 1.0,
            "answers": 4.0,
            "length.mean": 2.5,
            "length.best": 2.5,
            "missingEnd": 0.25,
            "rewardLengthCorrelation": pytest.approx(0.4),
            "reward.brief": 4.0,
        }
        assert gold_figures(rows) == {}

    def test_gold_rewards_of_winners_beside_those_of_all(self) -> None:
        row = row_of(answer(0, 1.0, gold=5.0), answer(1, 3.0, gold=1.0))
        assert gold_figures([mark_winners(row, keep=1, min_score=None)]) == {"goldReward": 3.0, "goldRewardBest": 1.0}

    def test_rows_survive_being_written(self) -> None:
        row = mark_winners(
            row_of(answer(0, 0.1), answer(1, 1 / 3, gold=2.0), prompt="Wo – „da“?"), keep=1, min_score=None
        )
        row = dataclasses.replace(row, weight=0.7)
        assert row_from_document(json.loads(json.dumps(row_to_document(row)))) == row


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt to answer with a word or two and then to end."""
    folder = tmp_path_factory.mktemp("speaker")
    rows = [
        {"prompt": f"{n}: say something", "completion": " ".join(WORDS[(n * k) % 4] for k in range(1, 2 + n % 2))}
        for n in range(24)
    ]
    write_jsonl(folder / "promptCompletion-24.jsonl", rows)
    run = training_run(folder, "sft", lora=None, globalBatch=8, epochs=16, learningRate=1e-2, maxLength=64)
    result, code = run_in_process(folder, run)
    assert code == 0, result.message
    return output_folder(run)


STAGE: dict[str, Any] = {
    "rewards": [{"rule": "length", "weight": -1, "name": "brief"}, {"rule": "keywords", "keywords": ["plumb"]}],
    "rollout": {"maxNewTokens": 12},
    "answers": 4,
}


def stage_run_of(folder: Path, speaker: Path, *, stage: dict[str, Any] | None = None, **fields: Any) -> StageRun:
    model = folder / "model-llama-float32"
    if not model.exists():
        shutil.copytree(speaker, model)
    defaults: dict[str, Any] = {"lora": LORA, "rows": 12, "globalBatch": 4, "maxLength": 96, "learningRate": 3e-3}
    return training_run(folder, "bestOfN", stage=STAGE | (stage or {}), **(defaults | fields))


def answers_in(folder: Path) -> list[Row]:
    return [row_from_document(json.loads(line)) for line in (folder / "answers.jsonl").read_text().splitlines()]


def without_sources(folder: Path) -> list[Row]:
    return [dataclasses.replace(row, source="") for row in answers_in(folder)]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_stage_samples_scores_and_learns_what_sft_learns_from_its_winners(tmp_path: Path, speaker: Path) -> None:
    run = stage_run_of(tmp_path, speaker, evaluation=0.2, stage={"keep": 2}, epochs=2)
    result, code = run_in_process(tmp_path, run)
    assert code == 0, result.message
    manifest, folder = manifest_of(run), output_folder(run)
    rows, metrics = answers_in(folder), manifest.metrics
    assert manifest.kind == "policy"
    assert len(rows) == 12
    for row in rows:
        assert len(row.responses) == 4
        assert [r.label == WINNER for r in row.responses] == [
            r.label == WINNER for r in mark_winners(row, keep=2, min_score=None).responses
        ]
        for one in row.responses:
            assert one.sampling["temperature"] == 1.0
            assert one.policy_digest
            assert one.score == pytest.approx(-one.sampling["tokens"] + ("plumb" in one.text.lower()), abs=1e-6), (
                "length counts the end"
            )
    trained = rows[: int(metrics["answers"] / 4)]
    assert 0 < len(trained) < len(rows), "held-out prompts are answered, too"
    for name, value in answer_figures(trained).items():
        assert metrics[name] == pytest.approx(value), name
    assert metrics["rewardBest"] > metrics["reward"]
    assert metrics["secondsGenerating"] > 0

    winners = winning_rows(trained)
    held = winning_rows(rows[len(trained) :])
    other = tmp_path / "sft"
    shutil.copytree(speaker, other / "model-llama-float32")
    data = [
        {"prompt": [message.to_chat() for message in row.prompt], "completion": row.responses[0].text}
        for row in (*winners, *held)
    ]
    write_jsonl(other / f"promptCompletion-{len(data)}.jsonl", data)
    settings: dict[str, Any] = {"globalBatch": 4, "maxLength": 96, "learningRate": 3e-3, "epochs": 2}
    sft = training_run(other, "sft", lora=LORA, rows=len(data), evaluation=0.2, **settings)
    result, code = run_in_process(other, sft)
    assert code == 0, result.message
    assert_same_bits(weights_in(folder), weights_in(output_folder(sft)))
    for name in ("loss", "evalLoss", "evalLossStart", "rows"):
        assert manifest_of(sft).metrics[name] == metrics[name]


class Killed(BaseException):
    """The process ends here, as far as the stage is concerned."""


@pytest.mark.parametrize("moment", ["scoring", "training"])
def test_killed_and_started_again_ends_with_the_same_bits(
    tmp_path: Path, speaker: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    settings: dict[str, Any] = {"epochs": 3, "checkpointEverySteps": 2}
    whole = tmp_path / "whole"
    expected = best_of_n.run(stage_context(whole, stage_run_of(whole, speaker, **settings)))
    assert expected is not None

    folder, sampled, steps = tmp_path / "killed", [], []
    run = stage_run_of(folder, speaker, **settings)
    real_sample, real_step, real_score = HuggingFaceRollout.sample, TrainingRun._take_step, RewardSet.score

    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        sampled.append(1)
        return real_sample(self, *args, **kwargs)

    monkeypatch.setattr(HuggingFaceRollout, "sample", sample)
    context = stage_context(folder / "one", run)

    def die_scoring(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise Killed

    def die_training(self: Any, objective: Any) -> None:
        if self.state.step == 5:
            wait_for_uploads(context)
            raise Killed
        real_step(self, objective)

    def count(self: Any, objective: Any) -> None:
        real_step(self, objective)
        steps.append(self.state.step)

    with monkeypatch.context() as patch:
        if moment == "scoring":
            patch.setattr(RewardSet, "score", die_scoring)
        else:
            patch.setattr(TrainingRun, "_take_step", die_training)
        with pytest.raises(Killed):
            best_of_n.run(context)
    assert RewardSet.score is real_score
    monkeypatch.setattr(TrainingRun, "_take_step", count)
    output = best_of_n.run(stage_context(folder / "two", run))
    assert output is not None
    assert len(sampled) == (2 if moment == "scoring" else 1)
    assert output.first_step == (0 if moment == "scoring" else 4)
    assert steps[0] == output.first_step + 1
    assert without_sources(output.folder) == without_sources(expected.folder)
    assert_same_bits(weights_in(output.folder), weights_in(expected.folder))
    timed = {"tokensPerSecond", "secondsGenerating", "secondsScoring", "secondsTraining"}
    assert {k: v for k, v in output.metrics.items() if k not in timed} == {
        k: v for k, v in expected.metrics.items() if k not in timed
    }


def test_damaged_answers_are_sampled_again(tmp_path: Path, speaker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stage_run_of(tmp_path, speaker, maxSteps=1)
    context = stage_context(tmp_path, run)
    first = best_of_n.run(context)
    assert first is not None
    kept = Path(context.run_root.removeprefix("file://")) / "answers.json"
    lines = (first.folder / "answers.jsonl").read_bytes()
    kept.write_bytes(kept.read_bytes().replace(b'"score"', b'"scorn"', 1))
    again = best_of_n.run(stage_context(tmp_path / "again", run))
    assert again is not None
    assert (again.folder / "answers.jsonl").read_bytes() == lines


def test_two_ranks_give_the_same_answers_and_weights(tmp_path: Path, speaker: Path) -> None:
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run = stage_run_of(
            folder, speaker, rows=10, evaluation=0.2, globalBatch=5, epochs=2, tokensPerBatch=128, processes=processes
        )
        run_ranks(folder, run)
        texts = [[(r.text, r.score, r.label) for r in row.responses] for row in answers_in(output_folder(run))]
        found.append((texts, weights_in(output_folder(run)), manifest_of(run).metrics["evalLoss"]))
    (texts, weights, loss), (others, again, other) = found
    assert texts == others
    assert loss == pytest.approx(other, rel=1e-5)
    for name, tensor in weights.items():
        assert torch.allclose(tensor, again[name], atol=1e-6), name


def test_what_it_learns_raises_the_reward_of_new_answers(tmp_path: Path, speaker: Path) -> None:
    """The same prompts, answered by the policy that learnt from its best answers, score more."""
    settings: dict[str, Any] = {"rows": 12, "epochs": 10, "lora": None, "stage": {"answers": 8, "keep": 2}}
    first = stage_run_of(tmp_path / "one", speaker, **settings)
    result, code = run_in_process(tmp_path / "one", first)
    assert code == 0, result.message
    second = stage_run_of(tmp_path / "two", output_folder(first), **(settings | {"maxSteps": 1, "seed": 9}))
    result, code = run_in_process(tmp_path / "two", second)
    assert code == 0, result.message
    before, after = manifest_of(first).metrics, manifest_of(second).metrics
    assert after["reward"] > before["reward"] + 0.25 * before["rewardGain"]


def test_gold_rewards_are_told_of_held_out_prompts(tmp_path: Path, speaker: Path) -> None:
    gold = {"rule": "keywords", "keywords": ["line"], "gold": True, "name": "judge"}
    run = stage_run_of(
        tmp_path, speaker, rows=12, evaluation=0.3, maxSteps=1, stage={"rewards": [*STAGE["rewards"], gold]}
    )
    result, code = run_in_process(tmp_path, run)
    assert code == 0, result.message
    metrics, rows = manifest_of(run).metrics, answers_in(output_folder(run))
    held = [row for row in rows if "gold" in row.responses[0].annotations]
    assert 0 < len(held) < len(rows)
    values = [("line" in r.text.lower()) * 1.0 for row in held for r in row.responses]
    assert metrics["goldReward"] == pytest.approx(sum(values) / len(values))
    assert "reward.judge" not in metrics


def test_a_bar_that_nobody_reaches_is_named_with_the_best(tmp_path: Path, speaker: Path) -> None:
    run = stage_run_of(tmp_path, speaker, stage={"minScore": 5})
    result, code = run_in_process(tmp_path, run)
    assert code == 2
    assert "scores 5.0 or more; the best has " in result.message
    assert "Lower minScore" in result.message


def test_stopped_while_sampling(tmp_path: Path, speaker: Path) -> None:
    context = stage_context(tmp_path, stage_run_of(tmp_path, speaker))
    context.stop.request()
    with pytest.raises(Interrupted, match="samples the same ones"):
        best_of_n.run(context)


def test_preflight_counts_steps_by_winners_and_refuses_prompts_without_room(tmp_path: Path, speaker: Path) -> None:
    """Of 40 prompts 2 winners each are 80 rows: ten steps of eight at most."""
    stage = STAGE | {"prompts": "q", "keep": 2, "training": {"maxLength": 64, "globalBatch": 8}}
    made = pipeline(tmp_path / "fits", speaker, [{"name": "best", "bestOfN": stage}], split={"test": 0})
    result, code = preflight(made)
    assert code == 0, result.message
    assert plan_of(made)["stages"][0]["estimate"]["steps"] == 10
    tight = stage | {"training": {"maxLength": 16}}
    made = pipeline(tmp_path / "tight", speaker, [{"name": "best", "bestOfN": tight}], split={"test": 0})
    result, code = preflight(made)
    assert code == 2
    assert "spec.stages[0].bestOfN.training.maxLength" in result.message
