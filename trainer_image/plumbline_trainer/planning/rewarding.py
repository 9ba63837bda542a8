"""What preflight looks at of rewards: classifiers, schemas, and whether rows have answers to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from plumbline_api.online import Reward
from plumbline_api.record import RunRecord, StageRecord
from plumbline_api.rewarding import reference_fault

from plumbline_trainer.errors import InputError
from plumbline_trainer.planning.facts import small_files, weights_header
from plumbline_trainer.planning.pins import Pin
from plumbline_trainer.planning.problems import Problems
from plumbline_trainer.rewards.rules import make_rule

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext


def rewards_of(stage: StageRecord, index: int) -> Iterator[tuple[str, int, Reward]]:
    """Every reward of a stage with its field path and number."""
    for number, wire in enumerate(stage.parameters.get("rewards") or []):
        yield f"spec.stages[{index}].{stage.type}.rewards[{number}]", number, Reward.model_validate(wire)


def check_rewards(context: StageContext, record: RunRecord, pins: Sequence[Pin | None], problems: Problems) -> None:
    """Read of classifiers all but the weights, and every JSON schema. Functions were found when they were pinned."""
    for index, stage in enumerate(record.stages):
        read = {ref.role: ref.external for ref in stage.inputs if ref.external is not None}
        for path, number, reward in rewards_of(stage, index):
            with problems.collecting():
                if reward.rule is not None:
                    make_rule(reward, path)
                elif reward.model is not None:
                    external = read[f"rewards.{number}.model"]
                    if (one := pins[external]) is not None:
                        _check_classifier(context, record, external, one, path)


def _check_classifier(context: StageContext, record: RunRecord, external: int, one: Pin, path: str) -> None:
    from plumbline_trainer.models.loading import check_classifier

    item = record.external_inputs[external]
    try:
        folder = small_files(context, item, one.digest)
        # A single file holds no classifier, which is said without a look at it.
        header = weights_header(context, item, folder) if folder.is_dir() else {}
        check_classifier(folder, header, item.uri)
    except InputError as error:
        raise InputError(f"{path}.model: {error}", reason=error.reason) from error


def refuse_missing_references(stage: StageRecord, index: int, prompts: str, form: str) -> None:
    """Refuse rewards that compare with the answers of rows that have none, now that the format is known.

    Raises:
        InputError: in the words of the static check.
    """
    for path, _, reward in rewards_of(stage, index):
        if (fault := reference_fault(reward, prompts, form)) is not None:
            raise InputError(f"{path}.{reward.choice}: {fault}")
