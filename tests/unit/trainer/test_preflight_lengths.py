"""What preflight says of lengths: tokens and memory of a stage, rows that a limit cuts or drops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plumbline_api.record import StageRecord
from plumbline_trainer.data.encode import Method, encode_rows
from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.engine.objective import row_tokens
from plumbline_trainer.models.loading import load_tokenizer
from plumbline_trainer.planning.estimates import can_be_sharded, estimate
from plumbline_trainer.planning.facts import ModelFacts
from plumbline_trainer.planning.memory import RUNTIME_BYTES
from support import tiny
from support.preflighting import pipeline, plan_of, preflight
from support.trainer import LocalPipeline, stage_context, write_jsonl

PLAIN = {"precision": "float32", "gradientCheckpointing": False}
"""What activations take is then simple arithmetic."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "base")


def test_token_counts_are_those_that_training_takes(tmp_path: Path, model: Path) -> None:
    made = pipeline(tmp_path, model)
    preflight(made)
    run = made.stage("sft")
    context = stage_context(tmp_path / "x", run)
    encoded = encode_rows(
        load_rows(context, run.inputs[1], "train"), load_tokenizer(model), method="completion", max_length=64
    )
    tokens = sum(len(row.prompt) + len(row.responses[0].ids) for row in encoded.rows)
    assert plan_of(made)["stages"][0]["estimate"]["tokens"] == pytest.approx(2 * tokens, rel=0.02)


@pytest.mark.parametrize("max_length", [48, 128])
@pytest.mark.parametrize(
    ("type_", "method"),
    [("dpo", "preference"), ("simpo", "preference"), ("rrhf", "ranked"), ("rewardModel", "score")],
)
def test_a_prompt_counts_once_for_all_answers_of_its_row(
    tmp_path: Path, model: Path, type_: str, method: Method, max_length: int
) -> None:
    """Three ranked answers to prompts of all lengths: the estimate is what training counts, by step and in memory."""
    ranked = [
        {"prompt": f"Say {'very ' * (i % 12)}{i}", "completions": [f"It is {i}. " * (1 + i % 3), f"{i}.", f"No {i}"]}
        for i in range(100)
    ]
    write_jsonl(tmp_path / "ranked.jsonl", ranked)
    training = {"maxLength": max_length, "globalBatch": 8, "epochs": 2, "tokensPerBatch": 4096} | PLAIN
    others = ({"name": "ranked", "source": f"file://{tmp_path}/ranked.jsonl"},)
    stage = {"name": "stage", type_: {"dataset": "ranked", "training": training}}
    made = pipeline(tmp_path, model, [stage], others=others)
    result, code = preflight(made)
    assert code == 0, result
    run = made.stage("stage")
    context = stage_context(tmp_path / "x", run)
    read = load_rows(context, run.inputs[1], "train")
    encoded = encode_rows(read, load_tokenizer(model), method=method, max_length=max_length)
    tokens = [row_tokens(row) for row in encoded.rows]
    assert sum(row.prompt != [] for row in encoded.rows) == len(encoded.rows), "prompts are shared"
    plan = plan_of(made)
    found = plan["stages"][0]["estimate"]
    assert found["tokens"] == pytest.approx(2 * sum(tokens), rel=0.02)
    facts = plan["models"]["model"]
    projections = 2 * (facts["heads"] + facts["keyValueHeads"]) * facts["headSize"]
    layer = 10 * facts["hidden"] + projections + 3 * facts["intermediate"]
    activations = 8 * max(tokens) * facts["layers"] * layer * 4
    assert found["memoryBytes"] == RUNTIME_BYTES + 16 * facts["parameters"] + activations, "a micro-batch of 8 rows"


FACTS = ModelFacts(
    architecture="M",
    parameters=8_000_000_000,
    layers=32,
    hidden=4096,
    intermediate=14336,
    heads=32,
    key_value_heads=8,
    head_size=128,
    vocabulary=128_000,
    context_length=None,
    storage_dtype="bfloat16",
    has_chat_template=True,
)


def whole_and_sharded(folder: Path, model: Path, lora: Any, **fields: Any) -> tuple[StageRecord, StageRecord]:
    """A stage on eight accelerators."""
    stage = {"dataset": "q", "training": {"precision": "bfloat16", "gradientCheckpointing": True}, **fields}
    made = pipeline(folder, model, [{"name": "sft", "sft": stage | ({"lora": lora} if lora else {})}])
    record = made.record.stage("sft")
    record = record.model_copy(update={"resources": record.resources.model_copy(update={"gpus_per_node": 8})})
    sharded = {"training": record.parameters["training"] | {"sharding": "full"}}
    return record, record.model_copy(update={"parameters": record.parameters | sharded})


def memory_of(record: StageRecord) -> int:
    found = estimate(record, FACTS, None, None).memory
    assert found is not None
    return found


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_shares_of_sharded_weights_are_what_eight_ranks_keep(tmp_path: Path, model: Path, lora: Any) -> None:
    """The more of a model is layers, the nearer its memory comes to an eighth."""
    facts = FACTS
    record, sharded = whole_and_sharded(tmp_path, model, lora)
    assert can_be_sharded(record)
    assert not can_be_sharded(sharded)
    whole, part = memory_of(record), memory_of(sharded)
    per_weight, held = (2, 2) if lora else (16, 8)
    around = facts.vocabulary * facts.hidden
    layers = 2 * (facts.parameters - around) / facts.layers
    saved = per_weight * facts.parameters * 7 / 8 - held * (around + layers)
    assert whole - part == pytest.approx(saved, abs=2)


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_what_holds_a_sharded_policy_is_shared_out_too(tmp_path: Path, model: Path, lora: Any) -> None:
    """An eighth of a reference, whose head is whole beside that, and of the Fisher diagonal and the copy of the start."""
    before, bare = (memory_of(item) for item in whole_and_sharded(tmp_path / "bare", model, lora))
    near = whole_and_sharded(tmp_path / "near", model, lora, kl={"baseModel": True})
    weights, head = 2 * FACTS.parameters, 2 * FACTS.vocabulary * FACTS.hidden
    assert memory_of(near[0]) - before == weights
    assert memory_of(near[1]) - bare == pytest.approx((weights - head) / 8 + head, abs=2)

    held = whole_and_sharded(tmp_path / "held", model, lora, ewc={"dataset": "q"})
    whole, part = (memory_of(item) for item in held)
    if lora is None:
        assert whole - before == 8 * FACTS.parameters
        assert part - bare == FACTS.parameters
        return
    # The peak is at the start: F, and gradients of the frozen weights, none of whose activations are computed again.
    assert whole - before > (4 + 2) * FACTS.parameters
    assert FACTS.parameters * 7 / 8 * (2 + 4 + 2) * 0.8 < whole - part < FACTS.parameters * 7 / 8 * (2 + 4 + 2)


class TestLengths:
    """What a stage's maxLength does to rows is told before anything is trained."""

    def made(self, folder: Path, model: Path, max_length: int, type_: str = "orpo") -> LocalPipeline:
        stages = [{"name": "pairs", type_: {"dataset": "p", "training": {"maxLength": max_length}}}]
        made = pipeline(folder, model, stages, split={})
        pairs = [
            {
                "prompt": f"{n}: " + "a plumb line hangs straight " * (9 if n == 3 else 1),
                "chosen": "It is true. " * (6 if n < 10 else 1),
                "rejected": "It leans.",
            }
            for n in range(20)
        ]
        write_jsonl(folder / "p.jsonl", pairs)
        return made

    @pytest.mark.parametrize("type_", ["dpo", "rrhf"])
    def test_dropped_and_cut_rows_are_counted_with_an_example(self, tmp_path: Path, model: Path, type_: str) -> None:
        made = self.made(tmp_path, model, 64, type_)
        result, code = preflight(made)
        assert code == 0, result
        assert result.preflight is not None
        (note,) = [note for note in result.preflight.notes if note.startswith("pairs: ")]
        run = made.stage("pairs")
        rows = load_rows(stage_context(tmp_path / "x", run), run.inputs[1], "train")
        encoded = encode_rows(rows, load_tokenizer(model), method="preference", max_length=64)
        assert encoded.dropped == 1
        assert encoded.truncated > 5
        assert f"about 1 of {len(rows)} rows have no room for an answer in maxLength 64 and are dropped" in note
        assert f"about {encoded.truncated} of {len(rows)} rows lose their end at maxLength 64" in note
        assert any("p.jsonl line 4" in note for note in plan_of(made)["notes"])

    def test_a_limit_that_cuts_nothing_is_not_spoken_of(self, tmp_path: Path, model: Path) -> None:
        result, _ = preflight(self.made(tmp_path, model, 512))
        assert result.preflight is not None
        assert not [note for note in result.preflight.notes if note.startswith("pairs: ")]

    def test_a_limit_that_leaves_no_row_is_refused(self, tmp_path: Path, model: Path) -> None:
        result, code = preflight(self.made(tmp_path, model, 8))
        assert code == 2
        assert result.message.startswith("spec.stages[0].orpo.training.maxLength: 8 tokens leave no room for an answer")
        assert result.message.endswith("Raise it")
