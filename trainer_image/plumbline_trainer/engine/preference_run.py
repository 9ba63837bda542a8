"""What preference stages load and build alike."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from plumbline_api.training import TunedStage

from plumbline_trainer.context import StageContext
from plumbline_trainer.data.encode import Encoded, EncodedRows, Method, encode_rows
from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.engine.loop import TrainingRun
from plumbline_trainer.engine.schedule import plan_steps
from plumbline_trainer.engine.scorer import Scorer
from plumbline_trainer.engine.trained import make_trainable, report_rows
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
    """Read and encode the stage's dataset, as pairs or with every ranked answer.

    Rows of which an answer would be cut away are dropped, counted and named.

    Raises:
        InputError: if a row cannot be encoded, or if none is left.
    """
    dataset, longest = context.input("dataset"), parameters.training.max_length
    encoded, held_out = (
        encode_rows(load_rows(context, dataset, split), policy.tokenizer, method=method, max_length=longest)
        for split in ("train", "evaluation")
    )
    report_rows(context, encoded, "training pairs")
    return PreferenceRows(encoded, held_out.rows)


def open_run(
    context: StageContext,
    ranks: Ranks,
    policy: Policy,
    parameters: TunedStage,
    rows: PreferenceRows,
    seed: int,
) -> TrainingRun:
    """The run over the rows, on the policy with a fresh adapter or all weights to train; nothing is resumed yet."""
    training = parameters.training
    model = make_trainable(policy, parameters.lora, seed, freeze=parameters.freeze)
    scorer = Scorer(model, precision=training.precision)
    plan = plan_steps(
        [row.row_id for row in rows.encoded.rows],
        seed=seed,
        global_batch=training.global_batch,
        epochs=training.epochs,
        max_steps=training.max_steps,
    )
    return TrainingRun(context, ranks, scorer, plan, rows.encoded.rows, training)
