"""What `make bench` computes from its measurements, and that it notices a transfer that moved something else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from bench import products, widening
from bench.aims_table import row_of as aims_row
from bench.measured import Clock, Measured, Task
from bench.online_rows import online_operations, online_shape
from bench.parts import StepParts, parts_of
from bench.parts_table import row_of as parts_row
from bench.quickstart import PeakMemory, stage_seconds
from bench.trainer_rows import Shape, shape_of
from bench.trainer_table import Case
from bench.transfer import require_equal, row_of
from plumbline_api.training import Lora
from plumbline_trainer.models.adapters import attach_lora
from plumbline_trainer.models.loading import load_base
from support.tiny import save_model


def test_an_aim_is_met_or_missed() -> None:
    def run(speed: float, peak: int, operations: float) -> Measured:
        return Measured(speed, 0.0, 0.0, [1.0], peak * 2**20, 500 * 2**20, operations, [])

    task = Task("", "dpo", "even", "model", 8, 8, 512, 1, "float32", 2, 1)
    runs = {"ours": [run(2.0, 900, 10.0)], "trl": [run(1.0, 2000, 25.0)]}
    row = aims_row("dpo, even", Case(task, runs, "2026-11-26", 1.0, "a machine"))
    assert row["× best"] == "2.00"
    assert row["aim"] == "≥ 2.5: **missed**"
    assert (row["FLOP bound"], row["share of the bound"]) == ("2.50", "0.80")
    assert row["memory aim"] == "≤ 0.45: met"
    assert row["imports and weights, of ours (MiB)"] == "500 of 900"
    assert row["memory ÷ best with nothing else"] == "0.25"
    on_device = aims_row("dpo, even, cuda", Case(task, runs, "2026-11-26", 1.0, "a machine"))
    assert (on_device["aim"], on_device["memory aim"]) == ("≥ 1.4: met", "none")


def test_seconds_of_stages_come_from_the_status() -> None:
    status = {
        "stages": [
            {"name": "sft", "startTime": "2026-11-25T19:42:13Z", "completionTime": "2026-11-25T19:44:33Z"},
            {"name": "dpo", "startTime": "2026-11-25T19:44:33Z", "completionTime": "2026-11-25T19:44:34Z"},
        ]
    }
    assert stage_seconds(status) == [("sft", 140.0), ("dpo", 1.0)]


def test_memory_of_children_is_seen() -> None:
    """The parent holds nothing; its child holds 64 MiB until its input ends."""
    child = "import sys; held = b'x' * 2**26; print(len(held), flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    process = psutil.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == str(2**26).encode()
    peak = PeakMemory(process, every_seconds=0.01)
    peak.start()
    while peak.gibibytes == 0 and process.is_running():
        peak.join(0.01)
    process.communicate()
    peak.join(10)
    assert not peak.is_alive()
    assert 1 / 16 < peak.gibibytes < 1 / 4


def test_ratios_are_medians_of_rounds() -> None:
    row = row_of(
        "small",
        40,
        {"raw up": [1.0, 2.0, 9.0], "our up": [2.0, 2.0, 10.0], "raw down": [1.0] * 3, "our down": [0.5] * 3},
    )
    assert (row["up ÷ raw"], row["down ÷ raw"], row["rounds"]) == ("0.90", "2.00", "3")
    assert row["up, down (MiB/s)"] == "20 / 80"


@pytest.mark.parametrize("harm", ["flip", "leave out", "add"])
def test_an_incomplete_download_is_noticed(tmp_path: Path, harm: str) -> None:
    for name in ("source", "found"):
        (tmp_path / name).mkdir()
        for part in ("a", "b"):
            (tmp_path / name / part).write_bytes(part.encode() * 100)
    require_equal(tmp_path / "source", tmp_path / "found")
    victim = tmp_path / "found" / "b"
    if harm == "flip":
        victim.write_bytes(b"b" * 99 + b"c")
    elif harm == "leave out":
        victim.unlink()
    else:
        (tmp_path / "found" / "c").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"instead of"):
        require_equal(tmp_path / "source", tmp_path / "found")


def test_arithmetic_of_an_iteration_by_hand() -> None:
    """A product with one weight is two operations; a backward pass costs a forward pass."""
    shape = Shape(layers=1, linear=100, head=10, width=0, adapter=0)
    ours = Task("ours", "ppo", "even", "", 1, 1, 512, 1, "float32", 1, 0, new_tokens=2)
    sampled = (600 + 20) + (400 + 40)
    looked = (1000 + 80) + (1000 + 40) + 1000  # policy with entropies, reference, critic
    assert online_operations(shape, ours, [3]) == sampled + looked + 4 * ((2000 + 80) + 2000)
    # trl takes the head at all positions, and pads the second prompt to the first.
    trl = replace(ours, side="trl", rows=2, global_batch=2)
    alone = sampled + (1000 + 100) + 1000 + 4 * ((2000 + 200) + 2000)
    assert online_operations(shape, trl, [3, 1]) == 2 * alone
    # Of grpo's answers the prompt is shared; trl's take one each.
    group = replace(ours, method="grpo", answers=3)
    tokens = 3 + 3 * 2
    assert online_operations(shape, group, [3]) == (600 + 20) + (1200 + 120) + (200 * tokens + 240) + (
        400 * tokens + 240
    )
    assert online_operations(shape, replace(group, side="trl"), [3]) == 3 * (sampled + 2000 + 80)


def test_the_shape_of_a_folder_is_that_of_the_loaded_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    model, _ = load_base(folder, "float32")
    attach_lora(model, Lora(rank=3, alpha=6), seed=1)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert online_shape(str(folder), 3) == shape_of(model, adapter)


def test_products_are_compared_for_every_weight() -> None:
    (row,) = products.measure(tokens=(2,), rounds=1)
    assert set(row) == {"tokens", *products.SHAPES}
    assert all(float(row[name].rstrip("×")) > 0 for name in products.SHAPES)


def test_widened_products_are_compared_for_every_weight_but_the_head() -> None:
    (row,) = widening.measure(tokens=(2,), rounds=1)
    assert set(row) == {"tokens", *list(products.SHAPES)[:3]}
    assert all(float(row[name].rstrip("×")) > 0 for name in widening.HELD)


def test_a_step_is_the_sum_of_its_parts() -> None:
    events = [
        SimpleNamespace(key="aten::addmm", self_cpu_time_total=2e6),
        SimpleNamespace(key="aten::mm", self_cpu_time_total=1e6),
        SimpleNamespace(key="aten::_scaled_dot_product_flash_attention_for_cpu_backward", self_cpu_time_total=5e5),
        SimpleNamespace(key="aten::mul", self_cpu_time_total=2.5e5),
        SimpleNamespace(key="aten::mean", self_cpu_time_total=2.5e5),
    ]
    parts = parts_of(events, wall=5.0)
    assert parts == {
        "products": 3.0,
        "attention": 0.5,
        "elementwise": 0.5,
        "between": 1.0,
        "step": 5.0,
    }
    row = parts_row("dpo, even", "ours", {**parts, "rows": 4.0})
    assert (row["rows"], row["step (s)"]) == ("4", "5.00")
    assert (row["matrix products"], row["copies"]) == ("3.00 (60%)", "0.00 (0%)")


@pytest.mark.parametrize(("place", "asked", "seen"), [(2, True, True), (1, True, False), (2, False, False)])
def test_the_last_step_is_taken_apart_and_no_other(place: int, asked: bool, seen: bool) -> None:
    task = Task("ours", "dpo", "even", "", 6, 2, 512, 1, "float32", 1, 1, parts=asked)
    clock = Clock([], task, StepParts())
    clock.mark()
    for step in range(3):  # of 6 rows, 2 a step
        if step == place:
            torch.ones(300, 300) @ torch.ones(300, 300)
        clock.mark()
    parts = clock.result(task, 60, 0.0, []).parts
    assert ("products" in parts) is seen
    assert ("step" in parts) is asked
