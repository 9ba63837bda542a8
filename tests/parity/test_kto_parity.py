"""KTO against trl: one loss with its gradient, a run of thirty steps, and what trl does otherwise.

trl rotates the completions by one within each *device batch* and takes the reference point from it alone. Where the
device batch is the whole step, in our order, that is our pairing, and values must agree.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.methods import Kto
from plumbline_api.training import Training
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.references import References
from plumbline_trainer.engine.schedule import StepPlan, plan_steps
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.engine.unpaired import DesirableAnswers, mismatched_rows
from plumbline_trainer.models.adapters import adapters_disabled
from support import peer
from support.tiny import STYLES, Style

WEIGHTS = {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.3}
CPU = torch.device("cpu")


def parameters(**changes: Any) -> Kto:
    fields = {**peer.TRAINING, "max_length": 512, **changes}
    return Kto.model_validate({"dataset": "d", "training": fields, **WEIGHTS})


def thumbs(rng: random.Random, count: int) -> list[Encoded]:
    return [
        peer.make_thumb(rng, rng.randint(2, 30), rng.randint(1, 30), f"row-{n}", desirable=rng.random() < 0.5)
        for n in range(count)
    ]


def objective_of(model: Any, steps: list[list[Encoded]], settings: Kto) -> DesirableAnswers:
    """With the model's start as the reference."""
    scorer = Scorer(model)
    needed = [row for step in steps for row in (*step, *mismatched_rows(step, 512))]
    score = partial(score_rows, scorer, tokens_per_batch=256, device=CPU)
    with adapters_disabled(model):
        references = References(needed, score(needed))
    return DesirableAnswers(references, score, settings)


def plan_of(rows: list[Encoded], training: Training) -> StepPlan:
    ids = [row.row_id for row in rows]
    return plan_steps(ids, seed=1, global_batch=training.global_batch, epochs=1, max_steps=None, least=2)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("count", [4, 5])
def test_loss_gradient_and_reference_point(tmp_path: Path, style: Style, count: int) -> None:
    """With an adapter that has moved, so that policy and reference differ; an even and an odd batch."""
    rows = thumbs(random.Random(3), count)
    assert len({row.responses[0].role for row in rows}) == 2
    settings = parameters(global_batch=count)
    start, ours = (peer.our_model(style, lora=True, touched=touched) for touched in (False, True))
    trainer = peer.kto_trainer(
        peer.their_model(start, style, lora=True),
        rows,
        peer.shared_arguments(tmp_path, settings.training),
        **WEIGHTS,
    )
    peer.move_adapter(trainer.model, ours)  # trl takes the adapter it is given as the reference
    batch = peer.first_batch(trainer)
    trainer.model.eval()
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    objective = objective_of(ours, [rows], settings)
    objective.look_ahead(rows)
    packed = pack(rows)
    sums = objective.sums(packed, Scorer(ours)(packed))
    loss = sums["loss"] / len(rows)
    loss.backward()

    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    logged = trainer._metrics["eval"]
    assert objective.point.item() == pytest.approx(logged["kl"][-1], rel=1e-4, abs=1e-5)
    for name, peers in {"rewardDesirable": "rewards/chosen", "rewardUndesirable": "rewards/rejected"}.items():
        assert float(sums[name].detach()) / len(rows) == pytest.approx(logged[peers][-1], rel=1e-4, abs=1e-5), name
    assert peer.gradient_gap(peer.gradients_by_name(ours), peer.gradients_by_name(trainer.model)) <= 1e-5


@pytest.mark.parametrize(("style", "lora"), [("llama", True), ("qwen2", True), ("llama", False)])
def test_thirty_steps(tmp_path: Path, style: Style, lora: bool) -> None:
    rows = thumbs(random.Random(4), 120)
    settings = parameters(learning_rate=5e-3 if lora else 3e-4)
    plan = plan_of(rows, settings.training)
    steps = [[rows[index] for index in plan.rows(step)] for step in range(30)]
    ours = peer.our_model(style, lora=lora)
    trainer = peer.kto_trainer(
        peer.their_model(ours, style, lora=lora),
        [row for step in steps for row in step],
        peer.shared_arguments(tmp_path, settings.training),
        **WEIGHTS,
    )
    theirs = peer.losses_of(trainer)
    objective = objective_of(ours, steps, settings)
    points: list[float] = []
    real = objective.look_ahead

    def looked(rows: Any, first: Any = None) -> None:
        real(rows, first)
        points.append(objective.point.item())

    objective.look_ahead = looked  # type: ignore[method-assign]
    found = peer.LossCurve(tmp_path, ours, rows, settings.training).train(objective)
    assert len(theirs) == len(found) == 30
    assert max(abs(loss - found[0]) for loss in found) > 0.05, "the model must move, or the curve says nothing"
    assert max(points) > 0, "and so must the reference point"
    assert found == pytest.approx(theirs, rel=peer.CURVE_TOLERANCE)


def test_trl_takes_the_point_of_each_device_batch_and_we_that_of_the_whole_step(tmp_path: Path) -> None:
    """training.md and the paper: one z for the global batch. trl with two device batches has two, and another loss."""
    rows = thumbs(random.Random(3), 4)
    start, ours = (peer.our_model("llama", lora=True, touched=touched) for touched in (False, True))
    trainer = peer.kto_trainer(
        peer.their_model(start, "llama", lora=True),
        rows,
        peer.shared_arguments(tmp_path, parameters(global_batch=2).training),
        **WEIGHTS,
    )
    peer.move_adapter(trainer.model, ours)
    trainer.model.eval()
    losses = [trainer.compute_loss(trainer.model, batch).item() for batch in trainer.get_train_dataloader()]
    points = trainer._metrics["eval"]["kl"]
    assert len(points) == 2
    assert points[0] != pytest.approx(points[1], rel=1e-2)

    found = []
    objective = objective_of(ours, [rows, rows[:2], rows[2:]], parameters())
    for step in (rows[:2], rows[2:]):
        objective.look_ahead(step)
        packed = pack(step)
        found.append(objective.sums(packed, Scorer(ours)(packed))["loss"].item() / 2)
    assert found == pytest.approx(losses, rel=1e-5), "a step of each half alone is what trl computes"
    objective.look_ahead(rows)
    packed = pack(rows)
    whole = objective.sums(packed, Scorer(ours)(packed))["loss"].item() / 4
    halves = []
    for step in (rows[:2], rows[2:]):
        packed = pack(step)
        halves.append(objective.sums(packed, Scorer(ours)(packed))["loss"].item() / 4)
    assert sum(halves) == pytest.approx(whole, rel=1e-6), "accumulation does not change the loss here"
    assert whole != pytest.approx(sum(losses) / 2, rel=1e-4)


def test_trl_pairs_a_tail_of_one_row_with_its_own_completion_and_we_never_do(tmp_path: Path) -> None:
    rows = thumbs(random.Random(3), 5)
    trainer = peer.kto_trainer(
        peer.their_model(peer.our_model("llama", lora=True), "llama", lora=True),
        rows,
        peer.shared_arguments(tmp_path, parameters().training),
        **WEIGHTS,
    )
    *_, tail = trainer.get_train_dataloader()
    assert tail["input_ids"].equal(tail["KL_input_ids"])
    plan = plan_of(rows, parameters().training)
    assert [len(plan.rows(step)) for step in range(plan.steps)] == [5]
