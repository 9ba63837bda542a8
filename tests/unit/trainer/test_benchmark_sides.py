"""Both sides of `make bench-trainer` run on a tiny model: what publishes figures must not break unseen."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.trainer_rows import METHODS
from bench.trainer_side import Task, measure_ours, measure_trl
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
