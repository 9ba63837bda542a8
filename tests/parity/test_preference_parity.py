"""The preference losses against trl: value and gradient of each, and runs of thirty steps.

Where trl differs, on purpose or by defect, the test's name says so and ours is held against the paper's form.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from plumbline_api.methods import Cpo, Orpo, Simpo
from plumbline_api.training import TrainingStage
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.packing import pack
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.losses import preference as losses
from plumbline_trainer.models.adapters import adapters_disabled
from support import peer, peer_pairs
from support.preferences import BETA, PARAMETERS, dpo, loss_by_formula, objective_of, references_of, scores_context

GAP = 1e-5


def make_rows(count: int, *, seed: int = 3, chosen: int | None = None, whole: int | None = None) -> list[Encoded]:
    """Uneven pairs; `chosen` fixes the length of the chosen answer, `whole` that of prompt and chosen answer together."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        prompt, rejected = rng.randint(2, 30), rng.randint(1, 30)
        length = whole - prompt if whole is not None else chosen or rng.randint(1, 30)
        rows.append(peer.make_pair(rng, prompt, length, rejected, name=f"pair-{number}"))
    return rows


def few_words(row: Encoded) -> Encoded:
    """Prompt and chosen answer in a language of twelve tokens, which thirty steps can learn."""
    chosen, rejected = row.responses
    chosen = dataclasses.replace(chosen, ids=[token % 12 for token in chosen.ids])
    return dataclasses.replace(row, prompt=[token % 12 for token in row.prompt], responses=[chosen, rejected])


def with_context(parameters: TrainingStage, rows: list[Encoded]) -> list[Encoded]:
    return [dataclasses.replace(row, score_context=scores_context(parameters)) for row in rows]


def our_loss(parameters: TrainingStage, model: Any, rows: list[Encoded]) -> torch.Tensor:
    rows = with_context(parameters, rows)
    objective, batch = objective_of(parameters, references_of(model, rows)), pack(rows)
    return objective.sums(batch, Scorer(model)(batch))["loss"] / len(rows)


def their_loss(trainer: Any) -> torch.Tensor:
    batch = peer.first_batch(trainer)
    trainer.model.eval()
    loss: torch.Tensor = trainer.compute_loss(trainer.model, batch)
    return loss


def trl_dpo(folder: Path, ours: Any, rows: list[Encoded], **fields: Any) -> Any:
    """trl's DPO on our moved adapter, with its start as the reference."""
    start = peer.our_model("llama", lora=True)
    trainer = peer.dpo_trainer(
        peer.their_model(start, "llama", lora=True),
        rows,
        peer.shared_arguments(folder, peer.training()),
        beta=BETA,
        **fields,
    )
    peer.move_adapter(trainer.model, ours)  # trl takes the adapter it is given as the reference
    return trainer


def trl_without_reference(
    folder: Path, parameters: TrainingStage, ours: Any, rows: list[Encoded], **fields: Any
) -> Any:
    theirs, arguments = peer.their_model(ours, "llama", lora=True), peer.shared_arguments(folder, peer.training())
    if isinstance(parameters, Orpo):
        return peer_pairs.orpo_trainer(theirs, rows, arguments, beta=parameters.beta)
    if isinstance(parameters, Simpo):
        fields = {
            "loss_type": "simpo",
            "beta": parameters.beta,
            "simpo_gamma": parameters.gamma,
            "cpo_alpha": parameters.sft_weight,
            **fields,
        }
    elif isinstance(parameters, Cpo):
        fields = {"loss_type": "sigmoid", "beta": parameters.beta, "cpo_alpha": parameters.sft_weight, **fields}
    return peer_pairs.cpo_trainer(theirs, rows, arguments, **fields)


def assert_same(parameters: TrainingStage, ours: Any, trainer: Any, rows: list[Encoded]) -> None:
    theirs = their_loss(trainer)
    theirs.backward()
    loss = our_loss(parameters, ours, rows)
    loss.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=GAP)
    found, wanted = peer.gradients_by_name(ours), peer.gradients_by_name(trainer.model)
    assert peer.gradient_gap(found, wanted) <= GAP


AS_TRL: dict[str, dict[str, Any]] = {
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.2},
    "ipo": {"loss_type": ["ipo"]},
    "hinge": {"loss_type": ["hinge"]},
    "exo": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "nca": {"loss_type": ["nca_pair"]},
    "apoZero": {"loss_type": ["apo_zero"]},
    "apoDown": {"loss_type": ["apo_down"]},
    "length-normalised": {"loss_type": ["sigmoid_norm"]},
}


@pytest.mark.parametrize("name", AS_TRL)
def test_dpo_losses(tmp_path: Path, name: str) -> None:
    rows, ours = make_rows(4), peer.our_model("llama", lora=True, touched=True)
    assert_same(PARAMETERS[name], ours, trl_dpo(tmp_path, ours, rows, **AS_TRL[name]), rows)


def test_trl_sigmoid_ignores_label_smoothing_ours_is_the_conservative_loss(tmp_path: Path) -> None:
    rows, ours = make_rows(4), peer.our_model("llama", lora=True, touched=True)
    theirs = their_loss(trl_dpo(tmp_path, ours, rows, loss_type=["sigmoid"], label_smoothing=0.2)).item()
    assert theirs == pytest.approx(our_loss(dpo(), ours, rows).item(), rel=GAP), "no label smoothing in trl"
    smoothed = our_loss(PARAMETERS["conservative"], ours, rows).item()
    assert smoothed != pytest.approx(theirs, rel=1e-3)
    assert smoothed == pytest.approx(loss_by_formula(PARAMETERS["conservative"], ours, rows).item(), rel=GAP)


def test_the_conservative_loss_is_the_one_of_trl_cpo_on_log_ratios() -> None:
    rng = torch.Generator().manual_seed(1)
    chosen, rejected = (torch.randn(16, generator=rng) * 5 for _ in range(2))
    theirs = peer_pairs.cpo_loss(chosen, rejected, loss_type="sigmoid", beta=BETA, label_smoothing=0.2)
    ours = losses.sigmoid_loss(chosen, rejected, beta=BETA, label_smoothing=0.2)
    torch.testing.assert_close(ours, theirs, rtol=GAP, atol=GAP)


def test_trl_dpo_has_ipo_on_means_only_sums_are_the_form_of_its_cpo() -> None:
    rows, ours = make_rows(4), peer.our_model("llama", lora=True, touched=True)
    scorer, scores = Scorer(ours), []
    with adapters_disabled(ours):
        scores.append(score_rows(scorer, rows, tokens_per_batch=256, device=torch.device("cpu")))
    scores.insert(0, score_rows(scorer, rows, tokens_per_batch=256, device=torch.device("cpu")))
    policy, reference = (torch.stack([torch.stack([a.sum() for a in row]) for row in found]) for found in scores)
    ratios = policy - reference
    theirs = peer_pairs.cpo_loss(ratios[:, 0], ratios[:, 1], loss_type="ipo", beta=BETA).mean()
    assert our_loss(PARAMETERS["ipoSum"], ours, rows).item() == pytest.approx(theirs.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("orpo", {"whole": 40}),
        ("simpo", {}),
        ("simpo with likelihood", {"chosen": 12}),
        ("cpo", {"chosen": 12}),
    ],
)
def test_losses_without_a_reference(tmp_path: Path, name: str, lengths: dict[str, int]) -> None:
    """Where there is a likelihood it runs over equally many tokens in each row: only there trl's mean is ours."""
    rows, ours = make_rows(4, **lengths), peer.our_model("llama", lora=True, touched=True)
    assert_same(PARAMETERS[name], ours, trl_without_reference(tmp_path, PARAMETERS[name], ours, rows), rows)


def test_sft_term_of_dpo(tmp_path: Path) -> None:
    rows, ours = make_rows(4, chosen=12), peer.our_model("llama", lora=True, touched=True)
    trainer = trl_dpo(tmp_path, ours, rows, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7])
    assert_same(PARAMETERS["rpo"], ours, trainer, rows)


@pytest.mark.parametrize("name", ["rpo", "orpo", "cpo", "simpo with likelihood"])
def test_trl_likelihood_is_a_mean_over_the_batchs_tokens_ours_a_mean_per_answer(tmp_path: Path, name: str) -> None:
    """The papers' expectation is over pairs. A mean over a micro-batch's tokens changes with accumulation (trap 5)."""
    parameters = PARAMETERS[name]
    rows, ours = make_rows(4), peer.our_model("llama", lora=True, touched=True)
    if name == "rpo":
        trainer = trl_dpo(tmp_path, ours, rows, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7])
    else:
        trainer = trl_without_reference(tmp_path, parameters, ours, rows)
    theirs, loss = their_loss(trainer).item(), our_loss(parameters, ours, rows).item()
    assert loss != pytest.approx(theirs, rel=1e-3)
    assert loss == pytest.approx(loss_by_formula(parameters, ours, with_context(parameters, rows)).item(), rel=GAP)

    weight = {"rpo": 0.7, "orpo": 1.0, "cpo": 1.0, "simpo with likelihood": 0.5}[name]
    tokens = [len(row.responses[0].ids) + (len(row.prompt) - 1 if name == "orpo" else 0) for row in rows]
    batch = pack(with_context(parameters, rows))
    with torch.no_grad():
        scores = Scorer(ours)(batch)
        sums = (batch.sum_by_answer(scores)[::2] + batch.sum_by_context(scores)).tolist()
    by_token = -sum(sums) / sum(tokens)
    by_answer = -sum(total / count for total, count in zip(sums, tokens, strict=True)) / len(rows)
    assert loss - theirs == pytest.approx(weight * (by_answer - by_token), rel=1e-3), "nothing else differs"


def test_trl_orpo_has_no_likelihood_of_answers_alone(tmp_path: Path) -> None:
    parameters = PARAMETERS["orpo on completions"]
    rows, ours = make_rows(4, whole=40), peer.our_model("llama", lora=True, touched=True)
    theirs = their_loss(trl_without_reference(tmp_path, parameters, ours, rows)).item()
    loss = our_loss(parameters, ours, rows).item()
    assert loss != pytest.approx(theirs, rel=1e-3)
    assert loss == pytest.approx(loss_by_formula(parameters, ours, rows).item(), rel=GAP)


def test_trl_simpo_adds_a_likelihood_unless_told_otherwise(tmp_path: Path) -> None:
    """Trap 22: its default α of 1 is CPO's; ours is 0, as in the paper."""
    rows, ours = make_rows(4, chosen=12), peer.our_model("llama", lora=True, touched=True)
    theirs, arguments = peer.their_model(ours, "llama", lora=True), peer.shared_arguments(tmp_path, peer.training())
    default = peer_pairs.cpo_trainer(theirs, rows, arguments, loss_type="simpo", beta=2.0, simpo_gamma=1.0)
    found = their_loss(default).item()
    assert found == pytest.approx(our_loss(Simpo(dataset="data", sft_weight=1.0), ours, rows).item(), rel=GAP)
    assert our_loss(PARAMETERS["simpo"], ours, rows).item() < 0.9 * found


@pytest.mark.parametrize(
    ("name", "lengths", "rate"),
    [("ipo", {}, 1e-2), ("orpo", {"whole": 40}, 1e-2), ("simpo", {}, 1e-2)],
)
def test_thirty_steps(tmp_path: Path, name: str, lengths: dict[str, int], rate: float) -> None:
    parameters, rows = PARAMETERS[name], make_rows(120, seed=4, **lengths)
    if name == "orpo":
        rows = [few_words(row) for row in rows]
    settings = peer.training(learning_rate=rate)
    in_order = peer.in_plan_order(rows, settings)
    ours = peer.our_model("llama", lora=True)
    theirs, arguments = peer.their_model(ours, "llama", lora=True), peer.shared_arguments(tmp_path, settings)
    if isinstance(parameters, Orpo):
        trainer = peer_pairs.orpo_trainer(theirs, in_order, arguments, beta=parameters.beta)
    elif isinstance(parameters, Simpo):
        trainer = peer_pairs.cpo_trainer(
            theirs, in_order, arguments, loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0
        )
    else:
        trainer = peer.dpo_trainer(theirs, in_order, arguments, beta=BETA, **AS_TRL[name])
    wanted = peer.losses_of(trainer)
    rows = with_context(parameters, rows)
    found = peer.LossCurve(tmp_path, ours, rows, settings).train(objective_of(parameters, references_of(ours, rows)))
    assert len(wanted) == len(found) == 30
    assert min(found) < 0.9 * found[0], "the model must move, or the curve says nothing"
    assert found == pytest.approx(wanted, rel=peer.CURVE_TOLERANCE)
