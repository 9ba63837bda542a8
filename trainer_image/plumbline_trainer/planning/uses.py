"""What stages take of datasets, and whether it is there."""

from __future__ import annotations

from plumbline_api.artifacts import FORMAT_DESCRIPTIONS, PREFERENCE_FORMATS
from plumbline_api.evaluation import Evaluate
from plumbline_api.record import ExternalInput, RunRecord, StageRecord, own_parameters
from plumbline_api.stages import REHEARSAL_FORMATS, STAGE_TYPES, SUITE_FORMATS
from plumbline_api.training import Training

from plumbline_trainer.data.loading import split_remedy, unscored
from plumbline_trainer.data.splits import Split
from plumbline_trainer.errors import InputError
from plumbline_trainer.models.ancestry import TRAINING_ROLES
from plumbline_trainer.planning.datasets import DatasetFindings
from plumbline_trainer.planning.lengths import leaves_no_row
from plumbline_trainer.planning.problems import Problems
from plumbline_trainer.planning.rewarding import refuse_missing_references


def check_uses(record: RunRecord, datasets: dict[str, DatasetFindings], problems: Problems) -> None:
    """Compare what datasets hold with what stages take, now that formats are known; of each use, the first fault.

    Args:
        record: of the run.
        datasets: what could be read, by name.
        problems: takes what does not fit.
    """
    for index, stage in enumerate(record.stages):
        for role, item in dataset_inputs(record, stage):
            found = datasets.get(item.name.removeprefix("dataset/"))
            if found is not None:
                with problems.collecting():
                    _check_use(stage, index, role, found, datasets)


def _check_use(
    stage: StageRecord, index: int, role: str, found: DatasetFindings, datasets: dict[str, DatasetFindings]
) -> None:
    """Check one dataset for one stage.

    Raises:
        InputError: in the words of the static check; or for a split without rows.
    """
    field_path, formats, split, owner = _need(stage, index, role)
    if found.format not in formats:
        fits = [other.name for other in datasets.values() if other.format in formats]
        needed = " or ".join(FORMAT_DESCRIPTIONS[name] for name in sorted(formats))
        raise InputError(
            f'{field_path}: "{found.name}" holds {FORMAT_DESCRIPTIONS[found.format]}; {owner} needs {needed}. '
            f"Datasets that fit: {', '.join(fits) or 'none'}"
        )
    if not found.splits[split].rows:
        there = ", ".join(f"{part.rows:,} in {name}" for name, part in found.splits.items() if part.rows)
        raise InputError(
            f'{field_path}: "{found.name}" has no rows in its {split} split ({found.rows:,} rows: {there}). '
            f"{split_remedy(split)}"
        )
    if role == "prompts":
        refuse_missing_references(stage, index, found.name, found.format)
    # What is rehearsed or held by ewc need not be what the stage compares or weighs.
    if stage.type == "kto" and role == "dataset":
        if (fault := found.splits[split].labels.one_sided) is not None:
            raise InputError(f'{field_path}: "{found.name}" {fault}')
        for part in ("train", "evaluation"):
            if found.splits[part].rows == 1:
                raise InputError(
                    f'{field_path}: "{found.name}" has one row in its {part} split; kto compares rows with '
                    "each other. Add rows, or change datasets[].split"
                )
    if stage.type == "awr" and role == "dataset":
        for part in ("train", "evaluation"):
            if where := found.splits[part].unscored:
                raise InputError(f'{field_path}: "{found.name}" {unscored(where)}')
    needs = Training.model_validate(stage.parameters.get("training", {})).needs_evaluation
    if role in ("dataset", "prompts") and needs is not None and not found.splits["evaluation"].rows:
        raise InputError(
            f'spec.stages[{index}].{stage.type}.training.{needs}: "{found.name}" has no rows in its evaluation '
            f"split ({found.rows:,} rows). {split_remedy('evaluation')}"
        )
    limit = stage.parameters.get("training", {}).get("maxLength")
    if role == "prompts" and limit is not None:
        limit -= stage.parameters["rollout"]["maxNewTokens"]
    if role in ("dataset", "prompts") and limit is not None and leaves_no_row(found.splits[split], limit):
        shortest = found.splits[split].prompts[0]
        raise InputError(
            f"spec.stages[{index}].{stage.type}.training.maxLength: {limit} tokens leave no room for an answer "
            f'in any row of "{found.name}", whose shortest prompt has {shortest:,}. Raise it'
        )


def _need(stage: StageRecord, index: int, role: str) -> tuple[str, frozenset[str], Split, str]:
    """Field path, formats that fit, split that is read, and who needs it."""
    here = f"spec.stages[{index}].{stage.type}"
    if role == "dataset":
        return f"{here}.dataset", STAGE_TYPES[stage.type].dataset_formats or frozenset(), "train", stage.type
    if role.startswith("rehearsal."):
        return f"{here}.rehearsal[{role.split('.')[1]}].dataset", REHEARSAL_FORMATS, "train", "rehearsal"
    if role == "prompts":
        return f"{here}.prompts", STAGE_TYPES[stage.type].dataset_formats or frozenset(), "train", stage.type
    if role == "sycophancy.dataset":
        return f"{here}.{role}", PREFERENCE_FORMATS, "test", "sycophancy"
    if role == "ewc.dataset":
        return f"{here}.{role}", REHEARSAL_FORMATS, "train", "ewc"
    suite = _evaluate(stage).suites[int(role.split(".")[1])]
    path = f"{here}.suites[{role.split('.')[1]}].{suite.choice}.dataset"
    split: Split = suite.value.split
    return path, SUITE_FORMATS[suite.choice], split, suite.choice


def _evaluate(stage: StageRecord) -> Evaluate:
    return Evaluate.model_validate(own_parameters(stage.parameters))


def dataset_inputs(record: RunRecord, stage: StageRecord) -> list[tuple[str, ExternalInput]]:
    """Datasets that a stage reads, with their roles."""
    external = [(ref.role, record.external_inputs[ref.external]) for ref in stage.inputs if ref.external is not None]
    return [(role, item) for role, item in external if item.kind == "dataset"]


def readers(record: RunRecord) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of the datasets that are trained on, and name and split of those that are measured on."""
    trained, tested = [], []
    for index, stage in enumerate(record.stages):
        for role, item in dataset_inputs(record, stage):
            name = item.name.removeprefix("dataset/")
            if role.split(".")[0] in TRAINING_ROLES:
                trained.append(name)
            else:
                tested.append((name, str(_need(stage, index, role)[2])))
    return trained, tested
