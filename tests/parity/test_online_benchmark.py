"""Both sides of `make bench-trainer` for stages that sample, on a tiny model: the pinned peers, and the stages themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bench.measured import Task
from bench.trainer import run_side
from bench.trainer_rows import ONLINE_METHODS
from support.tiny import save_model


@pytest.mark.parametrize("method", ONLINE_METHODS)
def test_both_sides_answer_the_same_prompts(tmp_path: Path, method: str) -> None:
    ours = Task(
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
        answers=2 if method == "grpo" else 1,
        new_tokens=8,
    )
    # Each in a process of its own, as it is published: what other tests left in memory would move base and peak.
    found = [run_side(ours), run_side(replace(ours, side="trl"))]
    for measured in found:
        assert len(measured.losses) == len(measured.step_seconds) == 2
        assert measured.rows_per_second > 0
        assert measured.peak_bytes > measured.base_bytes > 0
    assert found[0].tokens_per_second / found[0].rows_per_second == pytest.approx(
        found[1].tokens_per_second / found[1].rows_per_second
    )
