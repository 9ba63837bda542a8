"""One pass with a trained reward model: how its scores lie on training rows, and how good they are on held-out ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from plumbline_api.methods import RewardModel
from plumbline_api.stagerun import StageInput
from plumbline_api.training import Lora

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.data.encode import Encoded, EncodedRows, encode_rows
from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.data.splits import Split
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.sharding import own_part
from plumbline_trainer.engine.trained import row_counts
from plumbline_trainer.engine.values import ValueHeads, Values, ValueScorer, score_values
from plumbline_trainer.evaluation.rewards import HeldOutFigures, RewardedRow, measure_rewards
from plumbline_trainer.models.dtypes import place_weights, torch_dtype
from plumbline_trainer.models.policy import Policy
from plumbline_trainer.models.reward import KIND, RewardConfig, save_reward_model

EVALUATION = "evaluation.json"
SCALE_ROWS = 1024
"""Training rows over which mean and spread of the rewards are taken at most; of more, evenly spread ones."""


def encode_held_out(
    context: StageContext, dataset: StageInput, policy: Policy, max_length: int
) -> dict[Split, EncodedRows]:
    """The held-out rows by split; a split without rows is empty."""
    return {
        split: encode_rows(
            load_rows(context, dataset, split, may_be_empty=True),
            policy.tokenizer,
            method="score",
            max_length=max_length,
        )
        for split in ("evaluation", "test")
    }


def round_as_stored(policy: Policy, lora: Lora | None) -> None:
    """Bring fully trained weights to the values that storage will hold, so that what is measured is what is saved."""
    if lora is not None:
        return
    with torch.no_grad():
        for parameter in map(own_part, policy.model.parameters()):
            parameter.copy_(parameter.to(torch_dtype(policy.storage_dtype)))


def value_scorer(run: TrainingRun) -> ValueScorer:
    """The run's scorer, which reads scalar heads."""
    assert isinstance(run.scorer, ValueScorer)
    return run.scorer


def as_read_back(run: TrainingRun, policy: Policy, lora: Lora | None) -> ValueScorer:
    """The scorer that a reader of the stored model gets, at the stage's precision.

    Fully trained weights are float32 while they are trained; a reader holds them in the type that it computes in.
    """
    scorer = value_scorer(run)
    if lora is not None or scorer.precision == "float32":
        return scorer
    for parameter in run.trainables.values():
        parameter.grad = None  # makes room for the copy
    model = copy.deepcopy(policy.model)
    place_weights(model, scorer.precision, policy.model.device)
    found = ValueScorer(model, ValueHeads(scorer.heads.weight.detach()), precision=scorer.precision, path=scorer.path)
    found.requires_grad_(False)
    found.eval()
    return found


def reward_config(run: TrainingRun, scorer: ValueScorer, parameters: RewardModel) -> RewardConfig:
    """How scores are read, with their mean and spread over training rows.

    Raises:
        Interrupted: on SIGTERM.
    """
    rows = run.rows
    if len(rows) > SCALE_ROWS:
        rows = [rows[index * len(rows) // SCALE_ROWS] for index in range(SCALE_ROWS)]
    rewards = torch.cat(_values(run, scorer, rows, "scores of training rows")).double()
    return RewardConfig(
        heads=parameters.heads,
        max_length=parameters.training.max_length,
        mean=rewards.mean(dim=0).tolist(),
        std=rewards.std(dim=0, correction=0).tolist(),
        lora=parameters.lora,
        freeze=parameters.freeze,
    )


def measure_held_out(
    run: TrainingRun, scorer: ValueScorer, held_out: dict[Split, EncodedRows]
) -> tuple[Split, HeldOutFigures] | None:
    """Figures on the test split, or where that is empty on the evaluation split; None where nothing is held out.

    Raises:
        Interrupted: on SIGTERM.
    """
    split: Split = "test" if held_out["test"].rows else "evaluation"
    rows = held_out[split].rows
    if not rows:
        run.context.log.warning(
            "no rows are held out, so that nobody knows how good the reward model is. Set datasets[].split.test"
        )
        return None
    values = _values(run, scorer, rows, f"scores of the {split} split")
    return split, measure_rewards(
        [_rewarded(row, rewards) for row, rewards in zip(rows, values, strict=True)], seed=run.plan.seed
    )


def save_reward(
    context: StageContext,
    run: TrainingRun,
    policy: Policy,
    config: RewardConfig,
    encoded: EncodedRows,
    measured: tuple[Split, HeldOutFigures] | None,
) -> StageOutput | None:
    """Write the reward model and what is known of it, on rank 0."""
    run.gather()
    if not run.ranks.is_main:
        return None
    folder = context.scratch / "output"
    meta = save_reward_model(folder, value_scorer(run), policy, config)
    metrics = {} if measured is None else measured[1].metrics()
    metrics |= {
        "rewardMean": sum(config.mean) / config.heads,
        "rewardStd": sum(config.std) / config.heads,
        **run.figures(row_counts(encoded)),
    }
    if measured is not None:
        _write(folder / EVALUATION, {"version": 1, "split": measured[0], **measured[1].document()})
    return StageOutput(
        folder=folder,
        kind=KIND,
        meta=meta,
        metrics=metrics,
        tokens=run.tokens_here,
        first_step=run.first_step,
        last_step=run.state.step,
    )


def _values(run: TrainingRun, scorer: ValueScorer, rows: Sequence[Encoded], what: str) -> Values:
    def at_batch(done: int, batches: int) -> None:
        run.leave_if_stopped()
        if run.ranks.is_main:
            run.context.progress.update(run.state.step, run.plan.steps, f"{what}, batch {done + 1} of {batches}")

    return score_values(scorer, rows, tokens_per_batch=run.training.token_budget, ranks=run.ranks, at_batch=at_batch)


def _rewarded(row: Encoded, rewards: torch.Tensor) -> RewardedRow:
    return RewardedRow(
        group=row.group,
        ranks=[response.rank for response in row.responses],
        rewards=rewards.double().numpy(),
        # Of an unshared row the ids hold the prompt, too; what the assistant wrote is marked.
        lengths=[sum(response.mask) for response in row.responses],
    )


def _write(path: Path, document: dict[str, object]) -> None:
    path.write_text(json.dumps(document, allow_nan=False, indent=1) + "\n", encoding="utf-8")
