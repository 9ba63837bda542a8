"""The type checker of the alignment graph: refuses what cannot work before anything is asked of a cluster."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from plumbline_api.abort_rules import check_abort_rules
from plumbline_api.artifacts import FORMAT_DESCRIPTIONS, FORMAT_FIELDS, ArtifactKind
from plumbline_api.errors import Problem
from plumbline_api.graph import BASE_MODEL, Reference, find_cycle, references, yields
from plumbline_api.methods import EVALUATION_FIGURES
from plumbline_api.names import IMPLICIT_STAGES
from plumbline_api.online import SampledStage
from plumbline_api.permissions import check_permissions
from plumbline_api.pipeline import AlignmentPipeline, Dataset, PipelineSpec, Storage
from plumbline_api.rewarding import check_local_endpoints, check_reward_references, rewards_of
from plumbline_api.runtime import AlignmentRuntime, RewardEndpoint
from plumbline_api.stages import BASED_METHODS, MERGE_DEFAULTS
from plumbline_api.training import EarlyStopping, Training

Place = Literal["cluster", "local", "anywhere"]

MODEL_SCHEMES = ("hf", "s3", "pvc", "bundled", "file")
DATASET_SCHEMES = ("hf", "s3", "pvc", "file")
BUNDLED_MODELS = ("smollm2-135m-instruct",)
DATASET_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt", ".md")


def check(
    pipeline: AlignmentPipeline,
    runtime: AlignmentRuntime | None = None,
    *,
    place: Place = "anywhere",
    local_endpoints: Sequence[RewardEndpoint] = (),
) -> list[Problem]:
    """Everything that is wrong with a pipeline, with field paths and remedies; empty when it fits.

    With a runtime its limits and allow-lists are checked as well. `place` says where it will run: files of this
    machine are for local runs only, storage must come from somewhere on a cluster. `local_endpoints` are the reward
    endpoints that a local run knows of.
    """
    spec = pipeline.spec
    problems = [*_check_names(spec)]
    if not problems:
        problems += [
            *_check_references(spec),
            *_check_merges(spec),
            *_check_training_splits(spec),
            *_check_evaluation_splits(spec),
            *_check_columns(spec),
            *_check_gates(spec),
            *check_abort_rules(spec),
            *check_reward_references(spec),
        ]
    if not problems and (cycle := find_cycle(spec)) is not None:
        index = next(i for i, stage in enumerate(spec.stages) if stage.name == cycle[0])
        problems.append(
            Problem(
                f"spec.stages[{index}]",
                f"the stages form a cycle: {' → '.join(cycle)}. Take one of these references (model, after, …) out",
            )
        )
    problems += _check_sources(spec, place)
    if runtime is None and place == "local":
        problems += check_local_endpoints(spec, local_endpoints)
    if place != "local":
        problems += _check_storage(spec, runtime, place)
    if runtime is not None:
        problems += check_permissions(pipeline, runtime)
    return problems


def _check_names(spec: PipelineSpec) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    named = [(f"spec.datasets[{i}].name", d.name) for i, d in enumerate(spec.datasets)]
    named += [(f"spec.stages[{i}].name", s.name) for i, s in enumerate(spec.stages)]
    for path, name in named:
        if name in IMPLICIT_STAGES:
            yield Problem(path, f'"{name}" is the name of a built-in step; choose another')
        elif name in seen:
            yield Problem(
                path,
                f'"{name}" is taken by {seen[name].removesuffix(".name")}; stages and datasets share one name space',
            )
        seen.setdefault(name, path)


def _check_references(spec: PipelineSpec) -> Iterator[Problem]:
    datasets = {d.name: d for d in spec.datasets}
    stages = {s.name: s for s in spec.stages}
    for index, stage in enumerate(spec.stages):
        for ref in references(spec, index):
            if ref.target == BASE_MODEL:
                continue
            if ref.kind is ArtifactKind.DATASET:
                yield from _check_dataset(spec, ref, datasets, stage.type)
            elif ref.target not in stages:
                yield _unknown(ref.field, ref.target, "stage", list(stages), is_other=ref.target in datasets)
            elif yields(stages[ref.target]) is not ref.kind:
                fits = [s.name for s in spec.stages if yields(s) is ref.kind and s.name != stage.name]
                yield Problem(
                    ref.field,
                    f'"{ref.target}" ({stages[ref.target].type}) yields a {yields(stages[ref.target])}; a {ref.kind} '
                    f"is needed here. Stages that fit: {', '.join(fits) or 'none'}",
                )
        for number, name in enumerate(stage.after):
            if name not in stages:
                yield _unknown(
                    f"spec.stages[{index}].after[{number}]", name, "stage", list(stages), is_other=name in datasets
                )


def _check_dataset(
    spec: PipelineSpec, ref: Reference, datasets: dict[str, Dataset], stage_type: str
) -> Iterator[Problem]:
    dataset = datasets.get(ref.target)
    if dataset is None:
        is_stage = any(stage.name == ref.target for stage in spec.stages)
        yield _unknown(ref.field, ref.target, "dataset", list(datasets), is_other=is_stage)
        return
    if dataset.format != "auto" and dataset.format not in ref.formats:
        fits = [d.name for d in spec.datasets if d.format in ref.formats]
        needed = " or ".join(FORMAT_DESCRIPTIONS[name] for name in sorted(ref.formats))
        yield Problem(
            ref.field,
            f'"{ref.target}" holds {FORMAT_DESCRIPTIONS[dataset.format]}; {stage_type} needs {needed}. '
            f"Datasets that fit: {', '.join(fits) or 'none'}",
        )
    position = next(i for i, d in enumerate(spec.datasets) if d.name == ref.target)
    if ref.split is None and dataset.role == "test":
        yield Problem(
            ref.field,
            f'"{ref.target}" has role test: it is held out from every training stage. '
            f"Train on another dataset, or set spec.datasets[{position}].role to train and hold out a share with split",
        )
    if ref.split in ("evaluation", "test") and dataset.role != "test" and getattr(dataset.split, ref.split) == 0:
        yield Problem(
            ref.field,
            f'"{ref.target}" has no {ref.split} split. Set spec.datasets[{position}].split.{ref.split} (such as 0.1), '
            f"or spec.datasets[{position}].role to test if no stage trains on it",
        )


def _check_merges(spec: PipelineSpec) -> Iterator[Problem]:
    """Fields of a merge that its method does not read, and models that cannot be merged with one another."""
    for index, stage in enumerate(spec.stages):
        merge, here = stage.merge, f"spec.stages[{index}].merge"
        if merge is None:
            continue
        set_fields = [name for name in ("models", "base", "t", "density", "scale") if getattr(merge, name) is not None]
        if merge.method is None:
            if set_fields:
                methods = ", ".join(MERGE_DEFAULTS)
                yield Problem(f"{here}.method", f"is needed beside {', '.join(set_fields)}. Methods: {methods}")
            continue
        takes = {"models", *MERGE_DEFAULTS[merge.method], *(["base"] if merge.method in BASED_METHODS else [])}
        for name in set_fields:
            if name not in takes:
                others = [other for other in MERGE_DEFAULTS if name in MERGE_DEFAULTS[other]] or sorted(BASED_METHODS)
                yield Problem(
                    f"{here}.{name}", f"{merge.method} does not read it; leave it out, or choose {' or '.join(others)}"
                )
        if stage.model is not None:
            yield Problem(f"spec.stages[{index}].model", f"{merge.method} merges what merge.models names; leave it out")
        models = merge.models or []
        if not models:
            yield Problem(f"{here}.models", f"{merge.method} needs two or more models, such as {{stage: sft}}")
        elif merge.method == "slerp" and len(models) != 2:
            yield Problem(f"{here}.models", f"slerp takes two models, {len(models)} are named. For more use linear")
        elif merge.method == "slerp" and any(model.weight != 1 for model in models):
            yield Problem(f"{here}.models", "slerp does not read weight; set t, from 0 (the first) to 1 (the second)")
        seen: set[str | None] = set()
        for number, model in enumerate(models):
            if model.stage in seen:
                name = "spec.model" if model.stage is None else f'"{model.stage}"'
                yield Problem(f"{here}.models[{number}].stage", f"{name} is named twice; give it one larger weight")
            seen.add(model.stage)
            if merge.method in BASED_METHODS and model.stage == merge.base:
                yield Problem(
                    f"{here}.models[{number}].stage",
                    "is the base itself: it holds no changes. Leave it out, or use linear",
                )


def _check_training_splits(spec: PipelineSpec) -> Iterator[Problem]:
    for index, dataset in enumerate(spec.datasets):
        if dataset.split.evaluation + dataset.split.test >= 1 and dataset.role == "train":
            yield Problem(
                f"spec.datasets[{index}].split",
                "evaluation + test leave no rows to train on; set role to test if that is meant",
            )


def _check_evaluation_splits(spec: PipelineSpec) -> Iterator[Problem]:
    for index, stage in enumerate(spec.stages):
        training = getattr(stage.value, "training", None)
        if not isinstance(training, Training) or training.needs_evaluation is None:
            continue
        here = f"spec.stages[{index}].{stage.type}.training"
        metric, known = (training.early_stopping or EarlyStopping()).metric, EVALUATION_FIGURES[stage.type]
        if metric not in known:
            close = difflib.get_close_matches(metric, known, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(known)}"
            yield Problem(f"{here}.earlyStopping.metric", f'evaluations of {stage.type} have no "{metric}". {hint}')
        rows = stage.value.prompts if isinstance(stage.value, SampledStage) else stage.value.dataset
        position = next((i for i, d in enumerate(spec.datasets) if d.name == rows), None)
        if position is not None and spec.datasets[position].split.evaluation == 0:
            yield Problem(
                f"{here}.{training.needs_evaluation}",
                f'"{rows}" has no evaluation split to compare on. '
                f"Set spec.datasets[{position}].split.evaluation (such as 0.1)",
            )


def _check_columns(spec: PipelineSpec) -> Iterator[Problem]:
    for index, dataset in enumerate(spec.datasets):
        known = FORMAT_FIELDS.get(dataset.format, ())
        for column in dataset.columns if known else ():
            if column not in known:
                close = difflib.get_close_matches(column, known, n=1)
                hint = f"Did you mean {close[0]}?" if close else f"Its fields: {', '.join(known)}"
                yield Problem(
                    f"spec.datasets[{index}].columns.{column}",
                    f'format {dataset.format} has no field "{column}". {hint}',
                )


def _check_gates(spec: PipelineSpec) -> Iterator[Problem]:
    for index, stage in enumerate(spec.stages):
        measured = [suite.choice for suite in stage.evaluate.suites if suite.samples is None] if stage.evaluate else []
        for number, gate in enumerate(stage.gates):
            here = f"spec.stages[{index}].gates[{number}]"
            if gate.at_least is not None and gate.at_most is not None and gate.at_least > gate.at_most:
                yield Problem(here, f"no value is at least {gate.at_least:g} and at most {gate.at_most:g}")
            name = gate.metric.partition(".")[0]
            if stage.evaluate is None or name in measured:
                continue
            close = difflib.get_close_matches(name, measured, n=1)
            suites = ", ".join(dict.fromkeys(measured)) or "nothing that has a figure"
            hint = f"Did you mean {close[0]}?" if close else f"Its suites measure: {suites}"
            yield Problem(f"{here}.metric", f'"{gate.metric}" is not measured by this stage. {hint}')


def _unknown(path: str, name: str, noun: str, known: list[str], *, is_other: bool) -> Problem:
    if is_other:
        other = "dataset" if noun == "stage" else "stage"
        return Problem(
            path, f'"{name}" is a {other}; a {noun} is needed here. {noun.capitalize()}s: {", ".join(known) or "none"}'
        )
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"Did you mean {close[0]}?" if close else f"{noun.capitalize()}s: {', '.join(known) or 'none'}"
    return Problem(path, f'there is no {noun} "{name}". {hint}')


def _check_sources(spec: PipelineSpec, place: Place) -> Iterator[Problem]:
    yield from _check_model_source("spec.model.source", spec.model.source, place)
    for path, reward in rewards_of(spec):
        if reward.model is not None:
            yield from _check_model_source(f"{path}.model", reward.model, place)
    for index, stage in enumerate(spec.stages):
        if stage.evaluate is not None:
            for number, suite in enumerate(stage.evaluate.suites):
                judge = suite.win_rate.judge if suite.win_rate is not None else None
                here = f"spec.stages[{index}].evaluate.suites[{number}].winRate.judge"
                if judge is not None and judge.model is not None:
                    yield from _check_model_source(f"{here}.model.source", judge.model.source, place)
                if judge is not None and judge.rule is not None and judge.rule.matches is not None:
                    try:
                        re.compile(judge.rule.matches)
                    except re.error as error:
                        yield Problem(
                            f"{here}.rule.matches", f'"{judge.rule.matches}" is not a regular expression: {error}'
                        )
    for index, dataset in enumerate(spec.datasets):
        path = f"spec.datasets[{index}].source"
        scheme, separator, rest = dataset.source.partition("://")
        if not separator:
            scheme, rest = "file", dataset.source
        if scheme not in DATASET_SCHEMES:
            yield Problem(
                path, f'"{dataset.source}": datasets are read from {", ".join(f"{s}://" for s in DATASET_SCHEMES)}'
            )
        elif scheme == "file" and place == "cluster":
            yield _local_only(path, dataset.source)
        elif scheme != "hf" and not rest.split("?")[0].endswith((*DATASET_SUFFIXES, "*", "/")):
            yield Problem(
                path,
                f'"{dataset.source}": the suffix says how rows are stored; known are {", ".join(DATASET_SUFFIXES)}. '
                "A folder ends in /",
            )


def _check_model_source(path: str, source: str, place: Place) -> Iterator[Problem]:
    scheme, separator, rest = source.partition("://")
    if not separator or scheme not in MODEL_SCHEMES:
        shown = ", ".join(f"{s}://" for s in MODEL_SCHEMES)
        hint = ""
        if not separator:
            is_path = source.startswith(("/", ".", "~")) or source.count("/") != 1
            hint = f". For a folder of this machine write file://{source}"
            hint += "" if is_path else f", for a hub model hf://{source}"
        yield Problem(path, f'"{source}": models are read from {shown}{hint}')
    elif scheme == "bundled" and rest not in BUNDLED_MODELS:
        yield Problem(path, f'there is no bundled model "{rest}". Bundled: {", ".join(BUNDLED_MODELS)}')
    elif scheme == "file" and place == "cluster":
        yield _local_only(path, source)
    elif scheme == "pvc" and not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/.*)?", rest):
        yield Problem(path, f'"{source}": write pvc://claim/path')
    elif not rest:
        yield Problem(path, f'"{source}" names no location')


def _local_only(path: str, source: str) -> Problem:
    return Problem(
        path,
        f'"{source}" is a file of one machine; pods cannot read it. Use s3:// or pvc://, or run it locally with `plumbline run`',
    )


def _check_storage(spec: PipelineSpec, runtime: AlignmentRuntime | None, place: Place) -> Iterator[Problem]:
    storage: Storage | None = spec.storage
    if storage is None:
        if runtime is not None and runtime.spec.storage is None:
            yield Problem(
                "spec.storage",
                f"runtime {runtime.metadata.name} offers no storage; set spec.storage.uri to s3://bucket/prefix",
            )
        return
    scheme = storage.uri.partition("://")[0]
    if scheme not in ("s3", "file"):
        yield Problem(
            "spec.storage.uri",
            f'"{storage.uri}": results are written to s3://bucket/prefix (or file:///path in a local run)',
        )
    elif scheme == "file" and place == "cluster":
        yield _local_only("spec.storage.uri", storage.uri)
