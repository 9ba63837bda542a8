"""What a stage gives on one or several ranks, and whether two of them gave the same."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.stagerun import StageRun
from safetensors.torch import load_file
from support.ranks import run_ranks
from support.trainer import output_folder

FIGURES = frozenset({"loss", "evalLoss", "gradientNorm", "l2sp", "ewc"})
"""Those that are compared."""
SETTINGS: dict[str, Any] = {
    "rows": 12,
    "evaluation": 0.2,
    "globalBatch": 4,
    "maxSteps": 3,
    "epochs": 9,
    "learningRate": 1e-3,
    "schedule": {"warmupRatio": 0.0},
    # Without it Adam's first steps are signs, and the sign of a gradient near 0 is chance.
    "adamEpsilon": 1e-4,
    "tokensPerBatch": 96,
}
"""Of stages whose outcomes are compared: a few steps on rows that leave ranks idle."""


@dataclass(frozen=True)
class Outcome:
    """What a stage said at each step, and the weights that it yields."""

    curve: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    first_step: int | None = 0


def outcome_of(folder: Path, run: StageRun) -> Outcome:
    """Run a stage to its end, with as many ranks as it asks for."""
    result = run_ranks(folder, run)
    lines = (folder / "scratch" / "metrics.jsonl").read_text().splitlines()
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(output_folder(run).glob("*.safetensors")):
        weights |= {f"{path.stem}/{name}": tensor for name, tensor in load_file(path).items()}
    return Outcome([json.loads(line)["metrics"] for line in lines], weights, result.first_step)


def gap(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm."""
    assert weights.keys() == others.keys()
    total = sum(float(tensor.double().square().sum()) for tensor in weights.values())
    return math.sqrt(sum(float((weights[n] - others[n]).double().square().sum()) for n in weights) / total)


def assert_same(one: Outcome, other: Outcome, *further: str) -> None:
    """The same figures, with further ones, and weights up to 1e-5."""
    assert len(one.curve) == len(other.curve)
    for first, second in zip(one.curve, other.curve, strict=True):
        assert first.keys() == second.keys()
        for name in FIGURES.union(further) & first.keys():
            assert first[name] == pytest.approx(second[name], rel=1e-5), name
    assert gap(one.weights, other.weights) <= 1e-5
