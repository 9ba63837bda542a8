"""What `make bench-trainer` found so far, as a file and as a section of docs/benchmarks.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import page
from bench.measured import Measured, Task

FILE = Path(__file__).parent / "trainer.json"
MIB = 2**20
NOTE = (
    "`kto` is on unpaired rows, `kto-pairs` on preference rows (rows/s are pairs/s). Speeds are medians, ratios medians "
    "over paired runs. *Best* is trl without checkpointing, with a precomputed reference and the device batch in brackets, "
    "the fastest of those tried; *default* as trl comes, at the same precision and optimizer step. The FLOP bound is the "
    "ratio of floating-point operations that the two ways ask for (padding, repeated prompts, head at every position): what "
    "the speed-up against best would be at equal use of the machine, which the GFLOP/s show. Memory is the resident peak, and in brackets what of it "
    "lies above imports and weights. Where `ppo` and `grpo` are listed they sample: rows are prompts, with one answer each "
    "for ppo and several for grpo, all of the same length; a step is an iteration of sampling, scoring by a rule and updating (ppo four times, with "
    "an adapter and a head as its critic on both sides)."
)


@dataclass(frozen=True)
class Case:
    """A method at a profile: all runs of all sides."""

    task: Task
    """What was asked for; `side` is empty, `batch` is the device batch at which trl was fastest."""
    runs: dict[str, list[Measured]]
    date: str
    load: float
    """Average of the machine at the end, over 15 minutes."""
    machine: str


def read(file: Path = FILE) -> dict[str, Case]:
    """The cases found so far, by name."""
    if not file.is_file():
        return {}
    return {name: _case(value) for name, value in json.loads(file.read_text(encoding="utf-8")).items()}


def write(cases: Mapping[str, Case], file: Path = FILE) -> None:
    """Keep the cases, in the order of their names."""
    text = json.dumps({name: asdict(cases[name]) for name in sorted(cases)}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")


def section(cases: Mapping[str, Case]) -> str:
    """The table with how it came about."""
    how = (
        "`make bench-trainer` (tests/bench/trainer.py): our engine and trl 1.16.0 (ppo: 1.12.0) in processes of their own, "
        "in turn. LoRA of rank 16 on all linear layers. The reference pass counts whole, the first step does not. "
        "The raw figures are in tests/bench/trainer.json."
    )
    rows = [_row(cases[name]) for name in sorted(cases)]
    measured = [key for key in rows[0] if any(row[key] for row in rows)]  # a side may be left out everywhere
    rows = [{key: row[key] for key in measured} for row in rows]
    libraries = ("torch", "transformers", "trl", "peft", "accelerate")
    return page.section("Training against trl", how, rows, libraries, NOTE)


def _case(value: dict[str, Any]) -> Case:
    runs = {side: [Measured(**run) for run in found] for side, found in value["runs"].items()}
    return Case(**{**value, "task": Task(**value["task"]), "runs": runs})


def _row(case: Case) -> dict[str, str]:
    task, found = case.task, case.runs
    ours, best, default = (found.get(side, []) for side in ("ours", "trl", "trl-default"))
    answers = f"{task.answers} answers each, " if task.answers > 1 else ""
    row = {
        "method": task.method,
        "profile": task.profile,
        "ours (rows/s)": _speed(ours),
        "trl best (rows/s)": f"{_speed(best)} ({task.batch})" if best else "",
        "trl default (rows/s)": _speed(default),
        "× best": _ratio(ours, best),
        "× default": _ratio(ours, default),
        "FLOP bound": f"{best[0].operations / ours[0].operations:.2f}" if ours and best and ours[0].operations else "",
        "GFLOP/s, ours and best": f"{_rate(ours):.0f}, {_rate(best):.0f}" if ours and best and _rate(ours) else "",
        "ours (tokens/s)": f"{statistics.median(run.tokens_per_second for run in ours):.0f}" if ours else "",
        "memory ours (MiB)": _memory(ours),
        "memory trl best (MiB)": _memory(best),
        "memory trl default (MiB)": _memory(default),
        "memory, ours ÷ best": f"{_peak(ours) / _peak(best):.2f} ({_above(ours) / _above(best):.2f})"
        if ours and best
        else "",
        "asked for": f"{task.rows} rows, {task.global_batch} a step, {answers}{task.precision}, tokensPerBatch "
        f"{task.tokens_per_batch}, {len(ours)} runs, {task.model}",
        "when": f"{case.date}, load {case.load}, {case.machine}",
    }
    return row


def _ratio(ours: list[Measured], other: list[Measured]) -> str:
    ratios = [one.rows_per_second / two.rows_per_second for one, two in zip(ours, other, strict=False)]
    return f"{statistics.median(ratios):.2f}" if ratios else ""


def _rate(runs: list[Measured]) -> float:
    """Billions of floating-point operations per second, over the reference pass and all steps."""
    return statistics.median(run.operations / (run.reference_seconds + sum(run.step_seconds)) for run in runs) / 1e9


def _speed(runs: list[Measured]) -> str:
    return f"{statistics.median(run.rows_per_second for run in runs):.3f}" if runs else ""


def _peak(runs: list[Measured]) -> float:
    return statistics.median(run.peak_bytes for run in runs)


def _above(runs: list[Measured]) -> float:
    return statistics.median(run.peak_bytes - run.base_bytes for run in runs)


def _memory(runs: list[Measured]) -> str:
    return f"{_peak(runs) / MIB:.0f} ({_above(runs) / MIB:.0f})" if runs else ""
