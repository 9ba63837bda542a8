"""DPO (sigmoid) against trl: one loss with its gradient, and a run of thirty steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.methods import Dpo
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.preference import dpo_objective
from plumbline_trainer.engine.references import References
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.models.adapters import adapters_disabled
from support import peer
from support.tiny import STYLES, Style

BETA = 0.3
PARAMETERS = Dpo(dataset="data", beta=BETA)


def references_of(model: Any, rows: list[Encoded]) -> References:
    scorer = Scorer(model)
    with adapters_disabled(model):
        return References(rows, score_rows(scorer, rows, tokens_per_batch=256, device=torch.device("cpu")))


@pytest.mark.parametrize("style", STYLES)
def test_loss_and_gradient(tmp_path: Path, style: Style) -> None:
    """With an adapter that has moved, so that policy and reference differ."""
    rng = random.Random(3)
    rows = [peer.make_pair(rng, rng.randint(2, 30), rng.randint(1, 30), rng.randint(1, 30)) for _ in range(4)]
    start, ours = (peer.our_model(style, lora=True, touched=touched) for touched in (False, True))
    trainer = peer.dpo_trainer(
        peer.their_model(start, style, lora=True), rows, peer.shared_arguments(tmp_path, peer.training()), beta=BETA
    )
    peer.move_adapter(trainer.model, ours)  # trl takes the adapter it is given as the reference
    batch = peer.first_batch(trainer)
    trainer.model.eval()
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    objective = dpo_objective(PARAMETERS, references_of(ours, rows))
    packed = pack(rows)
    sums = objective.sums(packed, Scorer(ours)(packed))
    loss = sums["loss"] / len(rows)
    loss.backward()

    assert abs(loss.item() - 0.6931) > 1e-3, "policy and reference must differ"
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    logged = trainer._metrics["eval"]
    for name, peers in {
        "rewardMargin": "rewards/margins",
        "rewardAccuracy": "rewards/accuracies",
        "rewardChosen": "rewards/chosen",
        "rewardRejected": "rewards/rejected",
        "logpsChosen": "logps/chosen",
    }.items():
        assert float(sums[name]) / len(rows) == pytest.approx(logged[peers][-1], rel=1e-4, abs=1e-5), name
    found, wanted = peer.gradients_by_name(ours), peer.gradients_by_name(trainer.model)
    assert peer.gradient_gap(found, wanted) <= 1e-5


@pytest.mark.parametrize(("style", "lora"), [("llama", True), ("qwen2", True), ("llama", False)])
def test_thirty_steps(tmp_path: Path, style: Style, lora: bool) -> None:
    rng = random.Random(4)
    rows = [
        peer.make_pair(rng, rng.randint(2, 30), rng.randint(1, 30), rng.randint(1, 30), name=f"pair-{number}")
        for number in range(120)
    ]
    settings = peer.training(learning_rate=5e-3 if lora else 3e-4)
    in_order = peer.in_plan_order(rows, settings)
    ours = peer.our_model(style, lora=lora)
    trainer = peer.dpo_trainer(
        peer.their_model(ours, style, lora=lora), in_order, peer.shared_arguments(tmp_path, settings), beta=BETA
    )
    theirs = peer.losses_of(trainer)
    found = peer.LossCurve(tmp_path, ours, rows, settings).train(dpo_objective(PARAMETERS, references_of(ours, rows)))
    assert len(theirs) == len(found) == 30
    assert min(found) < 0.65, "the model must move, or the curve says nothing"
    assert found == pytest.approx(theirs, rel=peer.CURVE_TOLERANCE)
