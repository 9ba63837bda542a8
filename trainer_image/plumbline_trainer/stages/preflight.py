"""Opens everything a run will read, before anything asks for an accelerator."""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import asdict, dataclass, field
from typing import Any

from plumbline_api.artifacts import FORMAT_DESCRIPTIONS
from plumbline_api.evaluation import Evaluate
from plumbline_api.quantities import parse_quantity
from plumbline_api.record import ExternalInput, RunRecord, StageRecord, fingerprints
from plumbline_api.stagerun import PreflightFindings
from plumbline_api.stages import REHEARSAL_FORMATS, STAGE_TYPES, SUITE_FORMATS
from plumbline_api.training import Kto, Training
from pydantic.alias_generators import to_camel

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.data.loading import split_remedy
from plumbline_trainer.data.splits import Split
from plumbline_trainer.errors import InputError, Interrupted
from plumbline_trainer.models.ancestry import TRAINING_ROLES
from plumbline_trainer.planning.datasets import DatasetFindings, Leak, find_leaks, survey
from plumbline_trainer.planning.estimates import Estimate, estimate, shown_bytes
from plumbline_trainer.planning.facts import ModelFacts, local_tokenizer, model_facts
from plumbline_trainer.planning.hits import Hit, find_hits
from plumbline_trainer.planning.lengths import leaves_no_row, length_note
from plumbline_trainer.planning.pins import Pin, pin
from plumbline_trainer.planning.selections import check_selections
from plumbline_trainer.storage import uris

PLAN_FILE = "plan.json"
NOTE_CHARACTERS = 160
NOTES_MAX = 8
"""Notes travel in a termination message beside up to 48 digests; plan.json holds everything."""


@dataclass
class Findings:
    """Everything preflight found."""

    pins: list[Pin] = field(default_factory=list)
    models: dict[str, ModelFacts] = field(default_factory=dict)
    """By name of the external input."""
    datasets: dict[str, DatasetFindings] = field(default_factory=dict)
    """By name of the dataset."""
    hits: dict[str, Hit] = field(default_factory=dict)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    leaks: list[Leak] = field(default_factory=list)
    conditional_writes: bool = True
    notes: list[str] = field(default_factory=list)


def run(context: StageContext) -> StageOutput:
    """Pin, read, check, estimate, and look up what is in storage already.

    Raises:
        InputError: for the first thing a person must mend, with where it stands and what to do.
    """
    record = context.run.record
    if record is None:
        raise InputError("preflight was started without the run record")
    check_numerics(record)
    found = Findings(conditional_writes=probe_storage(context))
    for number, item in enumerate(record.external_inputs):
        _step(context, number, 2 * len(record.external_inputs), f"pinning {item.name}")
        found.pins.append(pin(context, item))
    digests = [item.digest for item in found.pins]
    for number, item in enumerate(record.external_inputs):
        _step(context, len(digests) + number, 2 * len(digests), f"reading {item.name}")
        if item.kind == "policy":
            found.models[item.name] = model_facts(context, item, digests[number])
    check_selections(context, record, record.external_inputs[0], digests[0])
    read_datasets(context, record, digests, found)
    check_stages(record, found.datasets)
    found.leaks = find_leaks(found.datasets.values(), *readers(record))
    found.hits = find_hits(context.store, record, fingerprints(record, digests))
    estimate_stages(record, found)
    found.notes = notes(record, found)
    plan = to_plan(record, found)
    context.store.put_bytes(
        uris.join(context.pipeline_root, PLAN_FILE), json.dumps(plan, ensure_ascii=False, indent=1).encode()
    )
    return StageOutput(
        folder=context.scratch,
        kind="report",
        metrics={"rows": float(sum(item.rows for item in found.datasets.values()))},
        message=f"{len(digests)} inputs pinned, {sum(hit.found for hit in found.hits.values())} of "
        f"{len(record.stages)} stages found in storage",
        preflight=PreflightFindings(
            digests=[base64.urlsafe_b64encode(bytes.fromhex(digest)).decode().rstrip("=") for digest in digests],
            cached="".join("1" if found.hits[stage.name].found else "0" for stage in record.stages),
            notes=[note[:NOTE_CHARACTERS] for note in found.notes[:NOTES_MAX]],
        ),
    )


def check_numerics(record: RunRecord) -> None:
    """Refuse stages whose numbers this trainer would compute otherwise.

    Raises:
        InputError: reason RuntimeTooOld.
    """
    for stage in record.stages:
        kind = STAGE_TYPES.get(stage.type)
        if kind is None or kind.numerics_version != stage.numerics_version:
            has = "does not know it" if kind is None else f"has version {kind.numerics_version}"
            raise InputError(
                f"stage {stage.name} needs numerics version {stage.numerics_version} of {stage.type}; this trainer "
                f"{has}. Use the trainer image that belongs to the operator's release",
                reason="RuntimeTooOld",
            )


def probe_storage(context: StageContext) -> bool:
    """Write to storage, and try whether it keeps a second conditional writer out.

    Raises:
        InputError: if storage cannot be written.
    """
    folder = uris.join(context.namespace_root, f"probes/{secrets.token_hex(8)}")
    probe = uris.join(folder, "probe")
    context.store.put_bytes(probe, b"first", if_absent=True)
    try:
        return not context.store.put_bytes(probe, b"second", if_absent=True)
    finally:
        context.store.delete_prefix(folder)


def read_datasets(context: StageContext, record: RunRecord, digests: list[str], found: Findings) -> None:
    """Read every dataset that was not read before with this content and this model.

    Raises:
        InputError: if one cannot be read, or has more bad rows than allowed.
    """
    model = next(item for item in record.external_inputs if item.name == "model")
    model_digest = digests[record.external_inputs.index(model)]
    tokenizer = None
    for item, digest in zip(record.external_inputs, digests, strict=True):
        if item.kind != "dataset":
            continue
        known = survey(context, item, digest, model_digest, tokenizer)
        if known is None:
            _check_stop(context)
            # Loading a tokenizer takes seconds: only where some dataset is new.
            tokenizer = local_tokenizer(context, model, model_digest)
            known = survey(context, item, digest, model_digest, tokenizer)
            assert known is not None
        found.datasets[known.name] = known


def check_stages(record: RunRecord, datasets: dict[str, DatasetFindings]) -> None:
    """Compare what datasets hold with what stages take, now that formats are known.

    Raises:
        InputError: in the words of the static check; or for a split without rows.
    """
    for index, stage in enumerate(record.stages):
        for role, item in _dataset_inputs(record, stage):
            found = datasets[item.name.removeprefix("dataset/")]
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
            if stage.type == "kto":
                if (fault := found.splits[split].labels.one_sided) is not None:
                    raise InputError(f'{field_path}: "{found.name}" {fault}')
                for part in ("train", "evaluation"):
                    if found.splits[part].rows == 1:
                        raise InputError(
                            f'{field_path}: "{found.name}" has one row in its {part} split; kto compares rows with '
                            "each other. Add rows, or change datasets[].split"
                        )
            needs = Training.model_validate(stage.parameters.get("training", {})).needs_evaluation
            if role == "dataset" and needs is not None and not found.splits["evaluation"].rows:
                raise InputError(
                    f'spec.stages[{index}].{stage.type}.training.{needs}: "{found.name}" has no rows in its evaluation '
                    f"split ({found.rows:,} rows). {split_remedy('evaluation')}"
                )
            limit = stage.parameters.get("training", {}).get("maxLength")
            if role == "dataset" and limit is not None and leaves_no_row(found.splits[split], limit):
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
    if role == "ewc.dataset":
        return f"{here}.{role}", REHEARSAL_FORMATS, "train", "ewc"
    suite = _evaluate(stage).suites[int(role.split(".")[1])]
    path = f"{here}.suites[{role.split('.')[1]}].{suite.choice}.dataset"
    split: Split = suite.value.split
    return path, SUITE_FORMATS[suite.choice], split, suite.choice


def _evaluate(stage: StageRecord) -> Evaluate:
    return Evaluate.model_validate({key: value for key, value in stage.parameters.items() if key != "seed"})


def _dataset_inputs(record: RunRecord, stage: StageRecord) -> list[tuple[str, ExternalInput]]:
    external = [(ref.role, record.external_inputs[ref.external]) for ref in stage.inputs if ref.external is not None]
    return [(role, item) for role, item in external if item.kind == "dataset"]


def readers(record: RunRecord) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of the datasets that are trained on, and name and split of those that are measured on."""
    trained, tested = [], []
    for index, stage in enumerate(record.stages):
        for role, item in _dataset_inputs(record, stage):
            name = item.name.removeprefix("dataset/")
            if role.split(".")[0] in TRAINING_ROLES:
                trained.append(name)
            else:
                tested.append((name, str(_need(stage, index, role)[2])))
    return trained, tested


def estimate_stages(record: RunRecord, found: Findings) -> None:
    """Steps, tokens, memory and accelerator time of every stage."""
    accelerator = record.runtime.accelerator if record.runtime is not None else None
    rate = accelerator.tokens_per_second_hint if accelerator is not None else None
    for stage in record.stages:
        read = [
            found.datasets[item.name.removeprefix("dataset/")].splits["train"]
            for role, item in _dataset_inputs(record, stage)
            if role == "dataset" or role.startswith("rehearsal.")
        ]
        rows = read[0] if read else None
        found.estimates[stage.name] = estimate(stage, found.models["model"], rows, rate, rehearsed=read[1:])


def notes(record: RunRecord, found: Findings) -> list[str]:
    """Short remarks for people, what matters most first."""
    said = [
        f"{leak.count} of {leak.of} held-out prompts of {leak.tested} stand in the training rows of {leak.trained}"
        for leak in found.leaks
    ]
    if not found.conditional_writes:
        said.append("storage ignores If-None-Match: two trainers at once could overwrite each other's results")
    memory = record.runtime.accelerator.memory if record.runtime and record.runtime.accelerator else None
    for stage in record.stages:
        need = found.estimates[stage.name].memory
        if memory is not None and need is not None and stage.resources.gpus_per_node and need > parse_quantity(memory):
            said.append(f"{stage.name} is estimated to need {shown_bytes(need)} per accelerator, which has {memory}")
        for _, source in _dataset_inputs(record, stage) if stage.type == "kto" else ():
            parameters = Kto.model_validate({key: value for key, value in stage.parameters.items() if key != "seed"})
            labels = found.datasets[source.name.removeprefix("dataset/")].splits["train"].labels
            if (advice := labels.advice(parameters)) is not None:
                said.append(f"{stage.name}: {advice}")
        if (remark := _length_note(record, stage, found)) is not None:
            said.append(f"{stage.name}: {remark}")
    for item in found.datasets.values():
        splits = ", ".join(f"{part.rows:,} {name}" for name, part in item.splits.items() if part.rows)
        bad = f", {_counted(item.bad, 'bad row')} skipped" if item.bad else ""
        same = f", {_counted(item.equal_pairs, 'pair')} with equal answers" if item.equal_pairs else ""
        good = sum(part.desirable for part in item.splits.values())
        liked = f", {good:,} desirable" if item.format == "unpaired" else ""
        said.append(f"{item.name}: {item.format}, {_counted(item.rows, 'row')} ({splits}){liked}{bad}{same}")
    hours = [found.estimates[stage.name].gpu_hours for stage in record.stages if not found.hits[stage.name].found]
    known = [value for value in hours if value is not None]
    if any(stage.resources.gpus_per_node for stage in record.stages):
        said.append(f"about {sum(known):.2f} GPU-hours of training" if known else "GPU-hours: unknown")
    return said


def _length_note(record: RunRecord, stage: StageRecord, found: Findings) -> str | None:
    """Rows that the limit of a training stage cuts; raw text goes on in the next sequence and is never cut."""
    limit = stage.parameters.get("training", {}).get("maxLength")
    for role, item in _dataset_inputs(record, stage):
        rows = found.datasets[item.name.removeprefix("dataset/")]
        if role == "dataset" and limit is not None and rows.format != "text":
            return length_note(rows.splits["train"], int(limit))
    return None


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def to_plan(record: RunRecord, found: Findings) -> dict[str, Any]:
    """plan.json: everything that was found."""
    return {
        "version": 1,
        "pipeline": record.pipeline.to_wire(),
        "recordDigest": record.digest(),
        "storage": {"conditionalWrites": found.conditional_writes},
        "inputs": [
            {"name": item.name, "uri": item.uri, "kind": item.kind, **_wire(one)}
            for item, one in zip(record.external_inputs, found.pins, strict=True)
        ],
        "models": {name: _wire(facts) for name, facts in found.models.items()},
        "datasets": [item.to_plan() for item in found.datasets.values()],
        "leaks": [_wire(leak) for leak in found.leaks],
        "stages": [
            {
                "name": stage.name,
                "type": stage.type,
                "fingerprint": found.hits[stage.name].fingerprint,
                "cached": found.hits[stage.name].found,
                "why": found.hits[stage.name].why_not or "found in storage",
                "estimate": _known(found.estimates[stage.name]),
            }
            for stage in record.stages
        ],
        "notes": found.notes,
    }


def _wire(value: Any) -> dict[str, Any]:
    """A dataclass as JSON of this project is written: in camelCase."""
    return {to_camel(key): item for key, item in asdict(value).items()}


def _known(value: Estimate) -> dict[str, Any]:
    return {
        "steps": value.steps,
        "tokens": value.tokens,
        "memoryBytes": value.memory,
        "gpuHours": "unknown" if value.gpu_hours is None else value.gpu_hours,
    }


def _step(context: StageContext, done: int, of: int, message: str) -> None:
    context.progress.update(done, of, message)
    _check_stop(context)


def _check_stop(context: StageContext) -> None:
    if context.stop.requested:
        raise Interrupted(message="stopped; preflight starts again from its beginning")
