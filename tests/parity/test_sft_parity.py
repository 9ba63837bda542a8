"""Supervised fine-tuning against trl: one loss with its gradient, and a run of thirty steps."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
from plumbline_api.training import Schedule, Training
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.objective import TokenLikelihood
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.scorer import Scorer
from support import peer
from support.tiny import STYLES, Style


def training(**changes: Any) -> Training:
    return peer.training(tokens_per_batch=128, schedule=Schedule(type="linear", warmup_ratio=0.1), **changes)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient(tmp_path: Path, style: Style, lora: bool, smoothing: float) -> None:
    """Also with smoothed labels, which are transformers' `label_smoothing_factor`."""
    rng = random.Random(3)
    rows = [
        peer.make_completion(rng, rng.randint(2, 30), rng.randint(2, 40), share=rng.choice([1.0, 0.6]))
        for _ in range(4)
    ]
    ours = peer.our_model(style, lora=lora, touched=True)
    arguments = peer.shared_arguments(tmp_path, training()) | {"label_smoothing_factor": smoothing}
    trainer = peer.sft_trainer(peer.their_model(ours, style, lora=lora), rows, arguments)
    batch = peer.first_batch(trainer)
    trainer.model.eval()
    theirs = trainer.compute_loss(trainer.model, batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum())
    theirs.backward()

    objective = TokenLikelihood()
    packed = pack(rows)
    loss = objective.sums(packed, Scorer(ours)(packed, smoothing))["loss"] / sum(objective.size(row) for row in rows)
    loss.backward()

    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert peer.gradient_gap(peer.gradients_by_name(ours), peer.gradients_by_name(trainer.model)) <= 1e-5


def few_words(row: Encoded) -> Encoded:
    """The same row in a language of twelve tokens, which thirty steps can learn."""
    responses = [
        dataclasses.replace(response, ids=[token % 12 for token in response.ids]) for response in row.responses
    ]
    return dataclasses.replace(row, responses=responses)


@pytest.mark.parametrize(("style", "lora"), [("llama", True), ("llama", False), ("gemma2", True)])
def test_thirty_steps(tmp_path: Path, style: Style, lora: bool) -> None:
    rng = random.Random(4)
    rows = [
        few_words(peer.make_completion(rng, rng.randint(2, 30), rng.randint(1, 40), name=f"row-{n}"))
        for n in range(120)
    ]
    settings = training(learning_rate=1e-2 if lora else 2e-3)
    in_order = peer.in_plan_order(rows, settings)
    ours = peer.our_model(style, lora=lora)
    trainer = peer.sft_trainer(
        peer.their_model(ours, style, lora=lora), in_order, peer.shared_arguments(tmp_path, settings)
    )
    theirs = peer.losses_of(trainer)
    found = peer.LossCurve(tmp_path, ours, rows, settings).train(TokenLikelihood())
    assert len(theirs) == len(found) == 30
    assert found[-1] < 0.9 * found[0], "the model must learn, or the curve says nothing"
    assert found == pytest.approx(theirs, rel=peer.CURVE_TOLERANCE)
