"""What preference stages load and build alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from plumbline_api.methods import PolicyStage
from plumbline_api.training import TunedStage
from transformers import PreTrainedModel

from plumbline_trainer.context import StageContext
from plumbline_trainer.data.encode import Encoded, EncodedRows, Method, encode_rows
from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.data.rehearsal import RehearsalRows, load_rehearsal
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.fisher import hold_weights
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.schedule import plan_steps
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.trained import make_trainable, report_rows
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.policy import Policy


@dataclass(frozen=True)
class PreferenceRows:
    """Encoded preference rows of a stage."""

    encoded: EncodedRows
    """To train on, and what became of the others."""
    held_out: list[Encoded]
    """To evaluate on; may be empty."""

    def with_context(self) -> PreferenceRows:
        """The same rows; the chosen answer is scored together with its prompt."""
        scored = [dataclasses.replace(row, score_context=True) for row in self.encoded.rows]
        held_out = [dataclasses.replace(row, score_context=True) for row in self.held_out]
        return PreferenceRows(dataclasses.replace(self.encoded, rows=scored), held_out)


def load_preferences(
    context: StageContext, policy: Policy, parameters: TunedStage, method: Method = "preference"
) -> PreferenceRows:
    """Read and encode the stage's dataset: pairs, every ranked answer, or labelled answers.

    Rows of which an answer would be cut away are dropped, counted and named.

    Raises:
        InputError: if a row cannot be encoded, or if none is left.
    """
    dataset, longest = context.input("dataset"), parameters.training.max_length
    encoded = load_training_rows(context, policy, parameters, method)
    rows = load_rows(context, dataset, "evaluation")
    held_out = encode_rows(rows, policy.tokenizer, method=method, max_length=longest)
    return PreferenceRows(encoded, held_out.rows)


def load_training_rows(context: StageContext, policy: Policy, parameters: TunedStage, method: Method) -> EncodedRows:
    """The training rows alone, as `load_preferences`; what became of them is said."""
    rows = load_rows(context, context.input("dataset"), "train")
    encoded = encode_rows(rows, policy.tokenizer, method=method, max_length=parameters.training.max_length)
    report_rows(context, encoded, "training pairs" if method == "preference" else "training rows")
    return encoded


def open_run(
    context: StageContext,
    ranks: Ranks,
    policy: Policy,
    parameters: TunedStage,
    rows: PreferenceRows,
    seed: int,
    wrap: Callable[[PreTrainedModel], Scorer] | None = None,
) -> TrainingRun:
    """The run over the rows and those that are rehearsed; nothing is resumed yet.

    It is on the policy with a fresh adapter, or with all weights to train.

    Args:
        context: Of the stage.
        ranks: Processes that share the work.
        policy: That the stage starts from.
        parameters: The stage's.
        rows: To train on.
        seed: Of every random choice.
        wrap: Makes the scorer around the model. Absent: one that reads the vocabulary's head.

    Raises:
        InputError: if a dataset to rehearse cannot be read, or leaves too few of the stage's own rows in a step.
    """
    training = parameters.training
    rehearsal = RehearsalRows()
    if isinstance(parameters, PolicyStage):
        rehearsal = load_rehearsal(context, parameters, policy.tokenizer, method="completion")
        for other in rehearsal.datasets:
            report_rows(context, other, "rehearsal rows")
    model = make_trainable(policy, parameters.lora, seed, freeze=parameters.freeze)
    scorer = Scorer(model, precision=training.precision) if wrap is None else wrap(model)
    plan = plan_steps(
        [row.row_id for row in rows.encoded.rows],
        seed=seed,
        global_batch=training.global_batch,
        epochs=training.epochs,
        max_steps=training.max_steps,
        rehearsal=rehearsal.plan,
        least=parameters.step_needs,
    )
    for step in range(plan.steps if plan.rehearsed else 0):
        if (own := len(plan.own_rows(step))) < parameters.least_rows:
            raise InputError(
                f"rehearsal leaves {own} of the stage's {len(plan.row_ids)} rows in step {step + 1}. "
                "Raise training.globalBatch, or lower the share"
            )
    run = TrainingRun(context, ranks, scorer, plan, rehearsal.behind(rows.encoded.rows), training)
    if isinstance(parameters, PolicyStage):
        hold_weights(run, policy, parameters, seed, method="completion")
    return run
