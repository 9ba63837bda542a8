"""Reward models against trl: one loss with its gradient, and a run of thirty steps; and where trl reads another token."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.ranking import RewardRanking
from plumbline_trainer.engine.values import ValueScorer, fresh_heads
from support import peer, peer_reward
from support.encoded import make_ranked
from support.tiny import STYLES, Style, make_tokenizer


def make_rows(rng: random.Random, count: int, *, margins: bool) -> list[Encoded]:
    """Pairs without trl's padding token: it takes the last other token for the end of the answer (see below)."""
    padding = make_tokenizer().pad_token_id
    rows = []
    for number in range(count):
        lengths = [rng.randint(1, 30), rng.randint(1, 30)]
        row = make_ranked(rng, rng.randint(2, 30), lengths, f"pair-{number}", margin=rng.random() if margins else 0.0)
        responses = [
            replace(response, ids=[token if token != padding else token + 1 for token in response.ids])
            for response in row.responses
        ]
        rows.append(replace(row, responses=responses))
    return rows


def our_scorer(style: Style, *, lora: bool, touched: bool = False) -> ValueScorer:
    model = peer.our_model(style, lora=lora, touched=touched)
    scorer = ValueScorer(model, fresh_heads(model, 1, seed=5))
    scorer.eval()
    return scorer


@pytest.mark.parametrize(("margins", "centring"), [(False, None), (True, 0.1)])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_loss_and_gradient(tmp_path: Path, style: Style, lora: bool, margins: bool, centring: float | None) -> None:
    rows = make_rows(random.Random(3), 4, margins=margins)
    ours = our_scorer(style, lora=lora, touched=lora)
    theirs = peer_reward.their_reward_model(style, lora=lora)
    peer_reward.take_weights(theirs, ours, lora=lora)
    trainer = peer_reward.reward_trainer(
        theirs, rows, peer.shared_arguments(tmp_path, peer.training()), centring=centring
    )
    trainer.model.eval()
    wanted = trainer.compute_loss(trainer.model, peer.first_batch(trainer))
    wanted.backward()

    packed = pack(rows)
    sums = RewardRanking(centring=centring).sums(packed, ours(packed))
    loss = sums["loss"] / len(rows)
    loss.backward()

    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    logged = trainer._metrics["eval"]
    for name, peers in {"rewardMargin": "margin", "rewardAccuracy": "accuracy", "rewardMean": "mean_reward"}.items():
        assert float(sums[name]) / len(rows) == pytest.approx(logged[peers][-1], rel=1e-4, abs=1e-5), name
    found = {**peer.gradients_by_name(ours.model), "score.weight": ours.heads.weight.grad}
    others = peer_reward.gradients(trainer.model)
    assert peer.gradient_gap(found, others) <= 1e-5


@pytest.mark.parametrize(("style", "lora"), [("llama", True), ("qwen2", True), ("llama", False)])
def test_thirty_steps(tmp_path: Path, style: Style, lora: bool) -> None:
    rows = make_rows(random.Random(4), 120, margins=True)
    settings = peer.training(learning_rate=5e-3 if lora else 3e-4)
    in_order = peer.in_plan_order(rows, settings)
    ours = our_scorer(style, lora=lora)
    theirs = peer_reward.their_reward_model(style, lora=lora)
    peer_reward.take_weights(theirs, ours, lora=lora)
    trainer = peer_reward.reward_trainer(theirs, in_order, peer.shared_arguments(tmp_path, settings), centring=0.01)
    wanted = peer.losses_of(trainer)
    curve = peer.LossCurve(tmp_path, ours.model, rows, settings, ours)
    found = curve.train(RewardRanking(centring=0.01))
    assert len(wanted) == len(found) == 30
    moved = (ours.heads.weight - fresh_heads(ours.model, 1, seed=5).weight).norm()
    assert moved > 1e-3, "the model must move, or the curve says nothing"
    assert max(abs(loss - found[0]) for loss in found) > 0.05
    assert found == pytest.approx(wanted, rel=peer.CURVE_TOLERANCE)


def test_trap_1_trl_reads_before_a_padding_token_that_ends_the_answer(tmp_path: Path) -> None:
    """Where pad = end, trl scores the token before the end; we score the end token. The rest of the loss is the same."""
    padding = make_tokenizer().pad_token_id
    (row,) = make_rows(random.Random(5), 1, margins=False)
    ended = replace(
        row,
        responses=[
            replace(response, ids=[*response.ids, padding], mask=[*response.mask, True], reads=(len(response.ids),))
            for response in row.responses
        ],
    )
    before = replace(ended, responses=[replace(r, reads=(len(r.ids) - 2,)) for r in ended.responses])
    ours = our_scorer("llama", lora=False)
    theirs = peer_reward.their_reward_model("llama", lora=False)
    peer_reward.take_weights(theirs, ours, lora=False)
    trainer = peer_reward.reward_trainer(
        theirs, [ended], peer.shared_arguments(tmp_path, peer.training()), centring=None
    )
    trainer.model.eval()
    with torch.no_grad():
        wanted = trainer.compute_loss(trainer.model, peer.first_batch(trainer)).item()
        at_end, at_before = (
            RewardRanking().sums(batch := pack([some]), ours(batch))["loss"].item() for some in (ended, before)
        )
    assert at_before == pytest.approx(wanted, rel=1e-5)
    assert abs(at_end - wanted) > 1e-3
