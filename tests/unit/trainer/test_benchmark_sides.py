"""Both sides of `make bench-trainer` run on a tiny model: what publishes figures must not break unseen."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from bench import generation
from bench.cuda import Kept
from bench.measured import Measured
from bench.trainer_rows import METHODS, shape_of
from bench.trainer_side import Task, measure_ours, measure_trl
from plumbline_trainer.models.loading import load_base
from plumbline_trainer.rollout.interface import Prompt
from support import adapted
from support.tiny import save_model


@pytest.mark.parametrize("method", METHODS)
def test_both_sides_measure_the_same_rows(tmp_path: Path, method: str) -> None:
    task = Task(
        side="ours",
        method=method,
        profile="even",
        model=str(save_model(tmp_path / "model")),
        rows=8,
        global_batch=4,
        tokens_per_batch=1024,
        batch=4,
        precision="float32",
        threads=1,
        left_out=1,
    )
    ours, trl = measure_ours(task), measure_trl(task)
    assert ours.rows_per_second > 0
    assert trl.rows_per_second > 0
    assert len(ours.losses) == len(trl.losses)


def test_a_kept_process_measures_one_task_after_another(tmp_path: Path) -> None:
    """As on a GPU machine, where starting takes longer than measuring."""
    task = Task("ours", "sft", "even", str(save_model(tmp_path / "model")), 4, 2, 512, 2, "float32", 1, 1)
    root = Path(__file__).resolve().parents[3]
    paths = os.pathsep.join(str(root / name) for name in ("operator", "trainer_image", "tests"))
    kept = Kept()
    try:
        found = [
            Measured(**json.loads(kept.measure("ours", json.dumps(asdict(one)), os.environ | {"PYTHONPATH": paths})))
            for one in (task, replace(task, rows=6))
        ]
        assert [len(one.losses) for one in found] == [2, 3]
        with pytest.raises(SystemExit, match="no-such-model"):
            kept.measure("ours", json.dumps(asdict(replace(task, model="/no-such-model"))), {})
    finally:
        kept.end()


def test_an_adapter_adds_its_own_weights_only_to_the_arithmetic(tmp_path: Path) -> None:
    model, _ = load_base(save_model(tmp_path / "model"), "float32")
    before = shape_of(model, 7)
    adapted.attach_and_move(model, adapted.lora_of("plain"), 1)
    assert shape_of(model, 7) == before


def test_rollouts_and_generate_answer_the_same_prompts(tmp_path: Path) -> None:
    model, tokenizer = load_base(save_model(tmp_path / "model"), "float32")
    adapted.attach_and_move(model, adapted.lora_of("plain"), 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prompts = [Prompt(str(length), list(range(5, 5 + length))) for length in (3, 9, 4)]
    rows = generation.compare(model, tokenizer, prompts, generation.Size(3, 2, 6, 1))
    assert [row["rollout"] for row in rows] == ["ours", "generate", "generate, adapter merged"]
    assert all(float(row["tokens per processor second"]) > 0 for row in rows)
    assert all(0 < float(row["tokens per answer"]) <= 6 for row in rows)
    for name, tensor in model.state_dict().items():
        assert (tensor - before[name]).abs().max() < 1e-6
