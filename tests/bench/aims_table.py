"""What was aimed at beside trl at its best settings, what was found, and what keeps it there: from the cases measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from bench import page
from bench.measured import Measured
from bench.trainer_table import MIB, Case

HOW = (
    "From the runs above; *cuda* is the GPU. The share of the bound is the speed-up divided by the FLOP bound: above 1 "
    "the machine does more of the operations asked for per second than with trl. Nothing that trains can hold less "
    "than imports and weights; on a GPU it is the weights alone."
)


@dataclass(frozen=True)
class Aim:
    """At least so many times trl's speed, at most such a share of its memory, if any."""

    speed: float
    memory: float | None


AIMS = {
    "dpo, even": Aim(2.5, 0.45),
    "kto, even": Aim(1.5, 0.6),
    "kto-pairs, even": Aim(2.0, 0.6),
    "rewardModel, even": Aim(1.5, 0.6),
    "sft, even": Aim(1.3, 0.6),
    "ppo, even": Aim(2.5, 0.5),
    "grpo, even": Aim(1.5, 1.0),
    "dpo, even, cuda": Aim(1.4, None),
    "dpo, long prompt, cuda": Aim(2.0, None),
}
"""By the names of cases: method, profile and, where it is no CPU, device."""


def section(cases: Mapping[str, Case]) -> str:
    """The table of aims of the methods that were measured on both sides."""
    rows = [row_of(name, cases[name]) for name in AIMS if name in cases and cases[name].runs.get("trl")]
    return page.section("Aims beside trl", HOW, rows, ("torch", "trl"))


def row_of(name: str, case: Case) -> dict[str, str]:
    """One case: aims, what was found, and the limits."""
    ours, best, aim = case.runs["ours"], case.runs["trl"], AIMS[name]
    pairs = list(zip(ours, best, strict=False))
    speed = statistics.median(one.rows_per_second / two.rows_per_second for one, two in pairs)
    bound = best[0].operations / ours[0].operations
    memory = _peak(ours) / _peak(best)
    floor = statistics.median(run.base_bytes for run in ours)
    return {
        "method, profile": name,
        "× best": f"{speed:.2f}",
        "aim": f"≥ {aim.speed:g}: {_word(speed >= aim.speed)}",
        "FLOP bound": f"{bound:.2f}",
        "share of the bound": f"{speed / bound:.2f}",
        "memory ÷ best": f"{memory:.2f}",
        "memory aim": f"≤ {aim.memory:g}: {_word(memory <= aim.memory)}" if aim.memory is not None else "none",
        "imports and weights, of ours (MiB)": f"{floor / MIB:.0f} of {_peak(ours) / MIB:.0f}",
        "memory ÷ best with nothing else": f"{floor / _peak(best):.2f}",
    }


def _word(met: bool) -> str:
    return "met" if met else "**missed**"


def _peak(runs: list[Measured]) -> float:
    return statistics.median(run.peak_bytes for run in runs)
