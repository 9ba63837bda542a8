"""Opens everything a run will read, before anything asks for an accelerator."""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import asdict, dataclass, field
from typing import Any

from plumbline_api.methods import Kto
from plumbline_api.quantities import parse_quantity
from plumbline_api.record import RunRecord, StageRecord, fingerprints, own_parameters
from plumbline_api.stagerun import PreflightFindings
from plumbline_api.stages import STAGE_TYPES
from pydantic.alias_generators import to_camel

from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.data.loading import load_dataset
from plumbline_trainer.errors import InputError, Interrupted
from plumbline_trainer.planning.asking import ask_endpoints
from plumbline_trainer.planning.datasets import DatasetFindings, Leak, as_input, find_leaks, survey
from plumbline_trainer.planning.estimates import Estimate, can_be_sharded, estimate
from plumbline_trainer.planning.facts import ModelFacts, local_tokenizer, model_facts, reading
from plumbline_trainer.planning.hits import Hit, find_hits
from plumbline_trainer.planning.lengths import length_note
from plumbline_trainer.planning.memory import shown_bytes
from plumbline_trainer.planning.pins import Pin, pin
from plumbline_trainer.planning.problems import Problems
from plumbline_trainer.planning.rewarding import check_rewards
from plumbline_trainer.planning.selections import check_selections, names_of
from plumbline_trainer.planning.uses import check_uses, dataset_inputs, readers
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
        InputError: for everything a person must mend, with where it stands and what to do.
    """
    record = context.run.record
    if record is None:
        raise InputError("preflight was started without the run record")
    check_numerics(record)
    found = Findings(conditional_writes=probe_storage(context))
    problems = Problems()
    pins = pin_inputs(context, record, problems)
    read_models(context, record, pins, found, problems)
    read_datasets(context, record, pins, found, problems)
    check_uses(record, found.datasets, problems)
    check_rewards(context, record, pins, problems)
    refuse(context, record, problems)
    found.pins = [one for one in pins if one is not None]
    digests = [item.digest for item in found.pins]
    found.leaks = find_leaks(found.datasets.values(), *readers(record))
    found.hits = find_hits(context.store, record, fingerprints(record, digests))
    silent = ask_endpoints(context, record, found.pins, found.hits, problems)
    _check_stop(context)  # an endpoint that was not waited for says nothing
    refuse(context, record, problems)
    estimate_stages(context, record, found)
    found.notes = [*silent, *notes(record, found)]
    write_plan(context, to_plan(record, found))
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


def refuse(context: StageContext, record: RunRecord, problems: Problems) -> None:
    """Tell what was found wrong so far.

    Raises:
        InputError: if that is anything.
    """
    if problems.found:
        write_plan(context, refused(record, problems))
        for message in problems.messages:
            context.log.error("%s", message)
        raise problems.as_error(PLAN_FILE)


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


def pin_inputs(context: StageContext, record: RunRecord, problems: Problems) -> list[Pin | None]:
    """Pin every external input; None for one that is not there or cannot be read."""
    pins: list[Pin | None] = []
    for number, item in enumerate(record.external_inputs):
        _step(context, number, 2 * len(record.external_inputs), f"pinning {item.name}")
        found = None
        with problems.collecting():
            found = pin(context, item)
        pins.append(found)
    return pins


def read_models(
    context: StageContext, record: RunRecord, pins: list[Pin | None], found: Findings, problems: Problems
) -> None:
    """Read the sizes of every model, and compare what stages name with the parts of the one they start from."""
    for number, (item, one) in enumerate(zip(record.external_inputs, pins, strict=True)):
        if item.kind != "policy" or one is None:
            continue
        _step(context, len(pins) + number, 2 * len(pins), f"reading {item.name}")
        with problems.collecting(), reading(item):
            found.models[item.name] = model_facts(context, item, one.digest)
            if item.name == "model":
                check_selections(context, record, item, one.digest, problems)


def read_datasets(
    context: StageContext, record: RunRecord, pins: list[Pin | None], found: Findings, problems: Problems
) -> None:
    """Read every dataset that was not read before with this content and this model.

    Where the model cannot be read, rows are checked but not measured.
    """
    number = next(index for index, item in enumerate(record.external_inputs) if item.name == "model")
    model, model_pin = record.external_inputs[number], pins[number]
    tokenizer = None
    for index, (item, one) in enumerate(zip(record.external_inputs, pins, strict=True)):
        if item.kind != "dataset" or one is None:
            continue
        _step(context, len(pins) + index, 2 * len(pins), f"reading {item.name}")
        with problems.collecting():
            if model_pin is None or model.name not in found.models:
                load_dataset(context, as_input(item, one.digest))
                continue
            known = survey(context, item, one.digest, model_pin.digest, tokenizer)
            if known is None:
                # Loading a tokenizer takes seconds: only where some dataset is new.
                tokenizer = local_tokenizer(context, model, model_pin.digest)
                known = survey(context, item, one.digest, model_pin.digest, tokenizer)
                assert known is not None
            found.datasets[known.name] = known


def estimate_stages(context: StageContext, record: RunRecord, found: Findings) -> None:
    """Steps, tokens, memory and accelerator time of every stage."""
    accelerator = record.runtime.accelerator if record.runtime is not None else None
    model, digest = next(
        (item, one.digest) for item, one in zip(record.external_inputs, found.pins, strict=True) if item.name == "model"
    )
    rate = accelerator.tokens_per_second_hint if accelerator is not None else None
    for stage in record.stages:
        read = [
            found.datasets[item.name.removeprefix("dataset/")].splits["train"]
            for role, item in dataset_inputs(record, stage)
            if role in ("dataset", "prompts") or role.startswith("rehearsal.")
        ]
        rows = read[0] if read else None
        partly = not stage.parameters.keys().isdisjoint(("lora", "freeze"))
        found.estimates[stage.name] = estimate(
            stage,
            found.models["model"],
            rows,
            rate,
            rehearsed=read[1:],
            names=names_of(context, model, digest) if partly else None,
            limit=memory_of_a_rank(record, stage),
        )


def memory_of_a_rank(record: RunRecord, stage: StageRecord) -> int | None:
    """Bytes that a rank of a stage may use: its accelerator's, or the pod's; None where nobody says."""
    if record.runtime is None:
        return None
    if stage.resources.gpus_per_node:
        memory = record.runtime.accelerator.memory if record.runtime.accelerator is not None else None
    else:
        memory = stage.resources.memory or record.runtime.classes.of(stage.runtime_class).memory
    return None if memory is None else int(parse_quantity(memory))


def notes(record: RunRecord, found: Findings) -> list[str]:
    """Short remarks for people, what matters most first."""
    said = [
        f"{leak.count} of {leak.of} held-out prompts of {leak.tested} stand in the training rows of {leak.trained}"
        for leak in found.leaks
    ]
    if not found.conditional_writes:
        said.append("storage ignores If-None-Match: two trainers at once could overwrite each other's results")
    for stage in record.stages:
        need, has = found.estimates[stage.name].memory, memory_of_a_rank(record, stage)
        if has is not None and need is not None and stage.resources.gpus_per_node and need > has:
            remedy = "; training.sharding: full would share it out" if can_be_sharded(stage) else ""
            said.append(
                f"{stage.name} is estimated to need {shown_bytes(need)} per accelerator, which has {shown_bytes(has)}"
                f"{remedy}"
            )
        for role, source in dataset_inputs(record, stage) if stage.type == "kto" else ():
            if role != "dataset":
                continue
            parameters = Kto.model_validate(own_parameters(stage.parameters))
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
    for role, item in dataset_inputs(record, stage):
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


def refused(record: RunRecord, problems: Problems) -> dict[str, Any]:
    """plan.json of a run that cannot begin."""
    return {
        "version": 1,
        "pipeline": record.pipeline.to_wire(),
        "recordDigest": record.digest(),
        "problems": [{"reason": error.reason, "message": str(error)} for error in problems.found],
    }


def write_plan(context: StageContext, plan: dict[str, Any]) -> None:
    """Write plan.json."""
    context.store.put_bytes(
        uris.join(context.pipeline_root, PLAN_FILE), json.dumps(plan, ensure_ascii=False, indent=1).encode()
    )


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
