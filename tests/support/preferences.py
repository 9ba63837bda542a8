"""Preference objectives for tests: parameters of every kind, objectives from them, and their formulas written out anew."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from plumbline_api.methods import Cpo, Dpo, Orpo, Rrhf, Simpo
from plumbline_api.training import Lora, TrainingStage
from plumbline_trainer.data.encode import Encoded
from plumbline_trainer.engine.objective import Objective
from plumbline_trainer.engine.preference import (
    RankedResponses,
    cpo_objective,
    dpo_objective,
    orpo_objective,
    simpo_objective,
)
from plumbline_trainer.engine.references import References
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.scoring import score_rows
from plumbline_trainer.models.adapters import adapters_disabled, attach_lora
from support.tiny import Style, make_model
from torch import Tensor

BETA = 0.3


def dpo(**fields: Any) -> Dpo:
    return Dpo.model_validate({"dataset": "data", "beta": BETA, **fields})


PARAMETERS: dict[str, TrainingStage] = {
    "sigmoid": dpo(),
    "conservative": dpo(labelSmoothing=0.2),
    "robust": dpo(loss="robust", labelSmoothing=0.2),
    "ipo": dpo(loss="ipo"),
    "ipoSum": dpo(loss="ipoSum"),
    "hinge": dpo(loss="hinge"),
    "exo": dpo(loss="exo"),
    "nca": dpo(loss="nca"),
    "apoZero": dpo(loss="apoZero"),
    "apoDown": dpo(loss="apoDown"),
    "length-normalised": dpo(lengthNormalized=True),
    "rpo": dpo(sftWeight=0.7),
    "orpo": Orpo(dataset="data", beta=BETA),
    "orpo on completions": Orpo(dataset="data", beta=BETA, sft_on="completion"),
    "simpo": Simpo(dataset="data"),
    "simpo with likelihood": Simpo(dataset="data", sft_weight=0.5),
    "cpo": Cpo(dataset="data", beta=BETA),
    "rrhf": Rrhf(dataset="data"),
}


def scores_context(parameters: TrainingStage) -> bool:
    return isinstance(parameters, Orpo) and parameters.sft_on == "all"


def objective_of(parameters: TrainingStage, references: References | None) -> Objective:
    if isinstance(parameters, Dpo):
        assert references is not None
        return dpo_objective(parameters, references)
    if isinstance(parameters, Orpo):
        return orpo_objective(parameters)
    if isinstance(parameters, Simpo):
        return simpo_objective(parameters)
    if isinstance(parameters, Cpo):
        return cpo_objective(parameters)
    assert isinstance(parameters, Rrhf)
    return RankedResponses(sft_weight=parameters.sft_weight)


def references_of(model: Any, rows: Sequence[Encoded]) -> References:
    """Under the model with its adapter off."""
    scorer = Scorer(model)
    with adapters_disabled(model):
        return References(rows, score_rows(scorer, rows, tokens_per_batch=256, device=torch.device("cpu")))


@lru_cache(maxsize=8)
def adapted_model(style: Style) -> Any:
    """With an adapter that has moved, so that policy and reference differ and both factors have gradients."""
    model = attach_lora(make_model(style, seed=1), Lora(rank=4), seed=1)
    rng = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1
    return model.eval()


def token_log_probabilities(model: Any, row: Encoded, index: int) -> Tensor:
    """[prompt + response] log p of every token but the first (0 there), by one ordinary forward; float64."""
    ids = torch.tensor([[*row.prompt, *row.responses[index].ids]])
    scores = torch.log_softmax(model(ids).logits[0].double(), -1)
    return torch.cat([torch.zeros(1).double(), scores[:-1].gather(1, ids[0, 1:, None]).squeeze(1)])


def loss_by_formula(parameters: TrainingStage, model: Any, rows: Sequence[Encoded]) -> Tensor:
    """The loss of a step as the papers write it, in float64 and without anything of the engine."""
    losses = [row.weight * _row_loss(parameters, model, row) for row in rows]
    return torch.stack(losses).sum() / sum(row.weight for row in rows)


def _row_loss(parameters: TrainingStage, model: Any, row: Encoded) -> Tensor:
    policy = [token_log_probabilities(model, row, index) for index in range(len(row.responses))]
    scored = [
        torch.tensor([False] * len(row.prompt) + response.mask) & (torch.arange(len(tokens)) > 0)
        for response, tokens in zip(row.responses, policy, strict=True)
    ]
    totals = [tokens[own].sum() for tokens, own in zip(policy, scored, strict=True)]
    counts = [int(own.sum()) for own in scored]
    means = [total / count for total, count in zip(totals, counts, strict=True)]
    sigma, log = torch.sigmoid, torch.log
    if isinstance(parameters, Rrhf):
        pairs = [(i, j) for j in range(len(means)) for i in range(j + 1, len(means))]  # i is worse than j
        ranking = sum((torch.relu(means[i] - means[j]) for i, j in pairs), torch.zeros(()).double())
        return ranking - parameters.sft_weight * means[0]
    if isinstance(parameters, Orpo):
        odds = [mean - log(1 - torch.exp(mean)) for mean in means]
        likelihood = means[0] if parameters.sft_on == "completion" else policy[0][1:].mean()
        return -likelihood - parameters.beta * log(sigma(odds[0] - odds[1]))
    if isinstance(parameters, Simpo):
        margin = parameters.beta * (means[0] - means[1]) - parameters.gamma
        return -log(sigma(margin)) - parameters.sft_weight * means[0]
    if isinstance(parameters, Cpo):
        return -log(sigma(parameters.beta * (totals[0] - totals[1]))) - parameters.sft_weight * means[0]
    assert isinstance(parameters, Dpo)
    with torch.no_grad(), adapters_disabled(model):
        reference = [token_log_probabilities(model, row, index)[own].sum() for index, own in enumerate(scored)]
    ratios = [total - other for total, other in zip(totals, reference, strict=True)]
    if parameters.length_normalized or parameters.loss == "ipo":
        ratios = [ratio / count for ratio, count in zip(ratios, counts, strict=True)]
    (w, r), b, e = ratios, parameters.beta, parameters.label_smoothing or 0.0
    margin = b * (w - r)
    by_name = {
        "sigmoid": lambda: -(1 - e) * log(sigma(margin)) - e * log(sigma(-margin)),
        "robust": lambda: (-(1 - e) * log(sigma(margin)) + e * log(sigma(-margin))) / (1 - 2 * e),
        "ipo": lambda: (w - r - 1 / (2 * b)) ** 2,
        "ipoSum": lambda: (w - r - 1 / (2 * b)) ** 2,
        "hinge": lambda: torch.relu(1 - margin),
        "exo": lambda: sigma(margin) * log(sigma(margin) / 0.999) + sigma(-margin) * log(sigma(-margin) / 0.001),
        "nca": lambda: -log(sigma(b * w)) - 0.5 * log(sigma(-b * w)) - 0.5 * log(sigma(-b * r)),
        "apoZero": lambda: 1 - sigma(b * w) + sigma(b * r),
        "apoDown": lambda: sigma(b * w) + 1 - sigma(margin),
    }
    return by_name[parameters.loss]() - parameters.sft_weight * means[0]
