"""What a training method refuses among its own parameters."""

from __future__ import annotations

from typing import Any

import pytest
from support.pipelines import (
    STAGES,
    pipeline_body,
    problems_with,
    retyped,
    stages_with,
)

CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "early stopping without an evaluation split": (
        {
            "stages": stages_with(
                1, sft={"dataset": "tickets", "training": {"earlyStopping": {}, "evaluateEverySteps": 5}}
            )
        },
        [
            'spec.stages[1].sft.training.earlyStopping: "tickets" has no evaluation split to compare on. '
            "Set spec.datasets[1].split.evaluation (such as 0.1)"
        ],
    ),
    "early stopping without evaluations on the way": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "training": {"earlyStopping": {}}})},
        ["spec.stages[2].dpo.training: earlyStopping compares evaluations on the way; set evaluateEverySteps as well"],
    ),
    "a field of another schedule": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "training": {"schedule": {"cycles": 3}}})},
        [
            "spec.stages[2].dpo.training.schedule: cycles belongs to type cosineRestarts, not to linear; leave it out "
            "or change type"
        ],
    ),
    "no heads": (
        {"stages": [{"name": "reward", "rewardModel": {"dataset": "prefs", "heads": 0}}]},
        ["spec.stages[0].rewardModel.heads: 0 is too small; it must be at least 1"],
    ),
    "negative beta": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "beta": 0})},
        ["spec.stages[2].dpo.beta: 0 is too small; it must be over 0"],
    ),
    "kto on pairs with a named reference": (
        {"stages": [*STAGES, {"name": "thumbs", "kto": {"dataset": "prefs", "reference": "sft"}}]},
        [],
    ),
    "kto with a batch of one": (
        {"stages": [*STAGES, {"name": "thumbs", "kto": {"dataset": "prefs", "training": {"globalBatch": 1}}}]},
        ["spec.stages[5].kto.training.globalBatch: 1 is too small; it must be at least 2"],
    ),
    **{
        f"{stage} with beta 0": (
            {"stages": retyped(2, **{stage: {"dataset": "prefs", "beta": 0}})},
            [f"spec.stages[2].{stage}.beta: 0 is too small; it must be over 0"],
        )
        for stage in ("orpo", "simpo", "cpo")
    },
    "negative margin": (
        {"stages": retyped(2, simpo={"dataset": "prefs", "gamma": -1})},
        ["spec.stages[2].simpo.gamma: -1 is too small; it must be at least 0"],
    ),
    "awr on preference rows": (
        {"stages": retyped(2, awr={"dataset": "prefs"})},
        [
            'spec.stages[2].awr.dataset: "prefs" holds preference rows (prompt, chosen, rejected); awr needs ranked rows '
            "(prompt, completions) or scored rows (prompt, completion, score). Datasets that fit: none"
        ],
    ),
    "more winners than answers": (
        {
            "stages": retyped(
                2, bestOfN={"prompts": "tickets", "rewards": [{"rule": "length"}], "answers": 2, "keep": 3}
            )
        },
        ["spec.stages[2].bestOfN: keep (3) is more than answers (2); lower it, or raise answers"],
    ),
    "best of n without held-out prompts to compare on": (
        {
            "stages": retyped(
                2,
                bestOfN={
                    "prompts": "tickets",
                    "rewards": [{"rule": "length"}],
                    "training": {"earlyStopping": {}, "evaluateEverySteps": 5},
                },
            )
        },
        [
            'spec.stages[2].bestOfN.training.earlyStopping: "tickets" has no evaluation split to compare on. '
            "Set spec.datasets[1].split.evaluation (such as 0.1)"
        ],
    ),
    "an expectile that is the best score": (
        {"stages": retyped(2, awr={"dataset": "prefs", "expectile": 1})},
        ["spec.stages[2].awr.expectile: 1 is too large; it must be below 1"],
    ),
    "unknown loss": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "ipo_sum"})},
        [
            'spec.stages[2].dpo.loss: "ipo_sum" is not one of sigmoid, robust, ipo, ipoSum, hinge, exo, nca, apoZero, apoDown. '
            "Did you mean ipoSum?"
        ],
    ),
    "label smoothing of a loss without": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "hinge", "labelSmoothing": 0.1})},
        [
            "spec.stages[2].dpo.labelSmoothing: 0.1 with loss hinge, which has no label smoothing; leave it out, or take loss "
            "exo, robust, sigmoid"
        ],
    ),
    "robust without label smoothing": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "robust"})},
        [
            "spec.stages[2].dpo: loss robust needs labelSmoothing, the share of pairs believed to be swapped, such as 0.1"
        ],
    ),
    "robust with half of the labels swapped": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "robust", "labelSmoothing": 0.5})},
        ["spec.stages[2].dpo.labelSmoothing: 0.5 is too large; it must be below 0.5"],
    ),
    "exo without label smoothing": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "exo", "labelSmoothing": 0})},
        ["spec.stages[2].dpo.labelSmoothing: 0 with loss exo, which needs a share above 0; leave it out for 0.001"],
    ),
    "means of means": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "ipo", "lengthNormalized": True})},
        [
            "spec.stages[2].dpo.lengthNormalized: true with loss ipo, which takes means over tokens by itself; leave it out"
        ],
    ),
    "means of sums": (
        {"stages": stages_with(2, dpo={"dataset": "prefs", "loss": "ipoSum", "lengthNormalized": True})},
        [
            "spec.stages[2].dpo.lengthNormalized: true with loss ipoSum, which takes sums; leave it out, or take loss ipo for means"
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_problems_name_field_value_and_remedy(case: str) -> None:
    changes, expected = CASES[case]
    assert problems_with(pipeline_body(**changes)) == expected
