"""Reference values: found by content, computed once in a namespace, never taken when damaged."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plumbline_api.stagerun import StageRun
from plumbline_api.training import Lora
from plumbline_trainer.data.encode import Encoded, EncodedResponse
from plumbline_trainer.engine import reference_pass
from plumbline_trainer.engine.packing import pack, packed_length
from plumbline_trainer.engine.reference_cache import ReferenceKey
from plumbline_trainer.engine.references import References, by_prompt, response_key, row_keys
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.models.adapters import attach_lora
from plumbline_trainer.models.policy import Policy, PolicyLineage
from plumbline_trainer.stages import dpo, kto
from support.encoded import make_completion, make_pair
from support.tiny import make_model
from support.trainer import stage_context, write_jsonl
from support.training_data import rows_of, training_run

LORA = {"rank": 4}
STAGES = {"dpo": dpo, "kto": kto}


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Responses of every pass with the reference."""
    calls: list[int] = []
    real = reference_pass.score_rows

    def counted(scorer: Any, rows: Any, **kwargs: Any) -> Any:
        calls.append(sum(len(row.responses) for row in rows))
        return real(scorer, rows, **kwargs)

    monkeypatch.setattr(reference_pass, "score_rows", counted)
    return calls


def attempt(folder: Path, run: StageRun, name: str) -> dict[str, float]:
    """Run a stage; its figures without those of time."""
    context = stage_context(folder / name, run)
    output = STAGES[run.type].run(context)
    assert output is not None
    return {key: value for key, value in output.metrics.items() if key != "tokensPerSecond"}


def packs(context_root: str) -> list[Path]:
    return sorted((Path(context_root.removeprefix("file://")) / "references").rglob("*.safetensors"))


def other(run: StageRun, **changes: Any) -> StageRun:
    """Another piece of work of the same namespace."""
    return run.model_copy(update={"fingerprint": random.Random(str(changes)).randbytes(32).hex(), **changes})


class TestCache:
    def test_an_attempt_after_the_first_computes_nothing(self, tmp_path: Path, scored: list[int]) -> None:
        run = training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, maxSteps=2, epochs=5)
        first = attempt(tmp_path, run, "one")
        assert scored == [16]
        assert attempt(tmp_path, run, "two") == first
        assert scored == [16]

    def test_another_stage_and_another_run_compute_nothing(self, tmp_path: Path, scored: list[int]) -> None:
        """Other β, other order of steps, another pipeline: the rows and the reference are the same."""
        run = training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, epochs=2, evaluation=0.2)
        attempt(tmp_path, run, "one")
        assert scored == [48]
        changed = other(run, parameters={**run.parameters, "beta": 0.5, "seed": 99})
        attempt(tmp_path, changed, "two")
        elsewhere = other(run, pipeline=run.pipeline.model_copy(update={"uid": "uid-2", "name": "second"}))
        attempt(tmp_path, elsewhere, "three")
        assert scored == [48]

    def test_another_method_computes_only_what_it_needs_besides(self, tmp_path: Path, scored: list[int]) -> None:
        attempt(tmp_path, training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, rows=8), "one")
        run = training_run(tmp_path, "kto", form="preference", lora=LORA, globalBatch=4, rows=8)
        attempt(tmp_path, run, "two")
        assert scored == [16, 16], "the pairs are there; only their mismatched answers are scored"

    def test_a_subset_in_another_order_computes_nothing(self, tmp_path: Path, scored: list[int]) -> None:
        run = training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, rows=12)
        attempt(tmp_path, run, "one")
        uri = write_jsonl(tmp_path / "some.jsonl", rows_of("preference", 12)[7:2:-1])
        inputs = [run.inputs[0], run.inputs[1].model_copy(update={"uri": uri})]
        attempt(tmp_path, other(run, inputs=inputs), "two")
        assert scored == [24]

    def test_a_further_row_is_computed_alone(self, tmp_path: Path, scored: list[int]) -> None:
        run = training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, rows=12)
        attempt(tmp_path, run, "one")
        uri = write_jsonl(tmp_path / "more.jsonl", rows_of("preference", 13))
        inputs = [run.inputs[0], run.inputs[1].model_copy(update={"uri": uri})]
        attempt(tmp_path, other(run, inputs=inputs), "two")
        assert scored == [24, 2]

    def test_a_flipped_byte_is_a_miss_and_the_values_come_out_the_same(self, tmp_path: Path, scored: list[int]) -> None:
        run = training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, maxSteps=2, epochs=5)
        first = attempt(tmp_path, run, "one")
        context = stage_context(tmp_path / "look", run)
        files = [*packs(context.run_root), *packs(context.namespace_root)]
        assert len(files) == 2
        before = [path.read_bytes() for path in files]
        for path, data in zip(files, before, strict=True):
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert attempt(tmp_path, run, "two") == first
        assert scored == [16, 16]
        assert [path.read_bytes() for path in files] == before, "mended"

    def test_values_without_a_manifest_count_for_nothing(self, tmp_path: Path, scored: list[int]) -> None:
        run = training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, maxSteps=2, epochs=5)
        attempt(tmp_path, run, "one")
        context = stage_context(tmp_path / "look", run)
        for path in [*packs(context.run_root), *packs(context.namespace_root)]:
            (path.parent / "manifest.json").unlink()
        attempt(tmp_path, run, "two")
        assert scored == [16, 16]

    def test_other_weights_are_other_values(self, tmp_path: Path, scored: list[int]) -> None:
        run = training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, rows=6)
        attempt(tmp_path, run, "one")
        another = training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, rows=6, style="qwen2")
        attempt(tmp_path, another, "two")
        assert scored == [12, 12]

    def test_the_same_weights_at_another_place_are_the_same(self, tmp_path: Path, scored: list[int]) -> None:
        run = training_run(tmp_path, "dpo", lora=LORA, globalBatch=4, rows=6)
        attempt(tmp_path, run, "one")
        place = tmp_path / "model-llama-float32"
        moved = tmp_path / "moved"
        place.rename(moved)
        inputs = [run.inputs[0].model_copy(update={"uri": f"file://{moved}"}), run.inputs[1]]
        attempt(tmp_path, other(run, inputs=inputs), "two")
        assert scored == [12]


def test_key_names_everything_that_values_depend_on() -> None:
    key = ReferenceKey(weights="w", path="fast", precision="float32", device="cpu", split="4096/1/2")
    changes: list[dict[str, Any]] = [
        {"weights": "v"},
        {"path": "plain"},
        {"precision": "bfloat16"},
        {"device": "cuda"},
        {"split": "4096/2/2"},
        {"version": 2},
    ]
    digests = {dataclasses.replace(key, **change).digest() for change in [{}, *changes]}
    assert len(digests) == 7


def test_modules_that_are_trained_whole_are_other_weights_in_bfloat16() -> None:
    """They and the norms are float32 then, so that the same start rounds otherwise; in float32 nothing differs."""

    def identity(lora: Lora, precision: str) -> str:
        lineage = PolicyLineage({"name": "base", "digest": "d"})
        policy = Policy(make_model("llama"), cast(Any, None), "float32", lineage, precision)
        return reference_pass._identity(policy, Scorer(attach_lora(policy.model, lora, 1), precision=precision))

    plain, whole = Lora(rank=2), Lora(rank=2, modules_to_save=["norm"])
    assert identity(plain, "float32") == identity(whole, "float32")
    assert identity(plain, "bfloat16") != identity(whole, "bfloat16")


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 9), max_size=4),
    ids=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    other_prompt=st.lists(st.integers(0, 9), max_size=4),
    other_ids=st.lists(st.integers(0, 9), min_size=1, max_size=4),
)
def test_keys_tell_prompts_and_answers_apart(
    prompt: list[int], ids: list[int], other_prompt: list[int], other_ids: list[int]
) -> None:
    one = response_key(prompt, EncodedResponse(ids, [True] * len(ids), "chosen"))
    two = response_key(other_prompt, EncodedResponse(other_ids, [True] * len(other_ids), "completion"))
    assert (one == two) == ((prompt, ids) == (other_prompt, other_ids)), "the role says nothing about the score"
    masked = response_key(prompt, EncodedResponse(ids, [False] * len(ids), "chosen"))
    assert one != masked


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(1, 8), budget=st.integers(16, 80), known=st.integers(0, 3))
def test_layout_takes_every_unknown_response_once_and_shares_prompts(
    seed: int, count: int, budget: int, known: int
) -> None:
    rng = random.Random(seed)
    rows = [make_pair(rng, rng.choice([0, 6]), 3, 2) for _ in range(count)]
    rows += [
        dataclasses.replace(row, responses=make_completion(rng, 1, rng.randint(1, 9)).responses)
        for row in rows
        if row.prompt
    ]
    rows += rows[:2]
    keys = [key for row in rows for key in row_keys(row)]
    there = set(keys[:known])
    laid = by_prompt(rows, there, budget)
    found = [key for row in laid for key in row_keys(row)]
    assert len(found) == len(set(found))
    assert set(found) == set(keys) - there
    assert all(packed_length(row) <= budget or len(row.responses) == 1 for row in laid)
    shared = [tuple(row.prompt) for row in laid if row.prompt]
    if budget >= 40:
        assert len(shared) == len(set(shared)), "one prompt, one row"


def test_values_do_not_depend_on_the_layout_beyond_rounding() -> None:
    rng = random.Random(2)
    row = make_pair(rng, 9, 5, 7)
    more = Encoded("m", "g", row.prompt, make_completion(rng, 9, 6).responses)
    model, cpu = make_model(), torch.device("cpu")
    apart = References([row, more], score_rows(model, [row, more], tokens_per_batch=64, device=cpu))
    laid = by_prompt([row, more], [], 64)
    assert len(laid) == 1
    assert len(laid[0].responses) == 3
    together = References(laid, score_rows(model, laid, tokens_per_batch=64, device=cpu))
    torch.testing.assert_close(together.of([row, more]), apart.of([row, more]), rtol=1e-6, atol=1e-5)
    assert torch.equal(together.totals(pack([row])), together.of([row]))
