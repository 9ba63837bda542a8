"""Whether stages name parts that the model has, and ask for nothing that is not there, before anything is trained."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING

from plumbline_api.fingerprint import digest_of
from plumbline_api.record import ExternalInput, RunRecord, StageRecord
from plumbline_api.training import Freeze, Lora

from plumbline_trainer.errors import InputError
from plumbline_trainer.models.quantization import refuse_without_device, refuse_without_package
from plumbline_trainer.models.selection import ModuleNames, refuse_unread_head, select
from plumbline_trainer.planning.facts import CACHE_FOLDER, small_files
from plumbline_trainer.planning.problems import Problems
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.manifests import read_json

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext

NAMES_VERSION = 3


def check_selections(
    context: StageContext, record: RunRecord, model: ExternalInput, digest: str, problems: Problems
) -> None:
    """Find stages that name parts which the model does not have, or 4-bit weights or vLLM where they cannot be.

    Args:
        context: of preflight.
        record: of the run.
        model: that the stages start from.
        digest: its pin.
        problems: takes what cannot be, with the path of the field.
    """
    for index, stage in enumerate(record.stages):
        with problems.collecting():
            _check_judges(record, stage, f"spec.stages[{index}].evaluate")
        with problems.collecting():
            _check_rollout(record, stage, f"spec.stages[{index}].{stage.type}.rollout.engine")
        lora = Lora.model_validate(stage.parameters["lora"]) if "lora" in stage.parameters else None
        freeze = Freeze.model_validate(stage.parameters["freeze"]) if "freeze" in stage.parameters else None
        if lora is None and freeze is None:
            continue
        path = f"spec.stages[{index}].{stage.type}"
        if lora is not None and lora.quantization is not None:
            field = f"{path}.lora.quantization"
            with problems.collecting():
                refuse_without_device(field, cuda=_has_cuda(record, stage))
                refuse_without_package(field)
        names = names_of(context, model, digest)
        with problems.collecting():
            try:
                select(names, lora, freeze)
                if stage.type == "rewardModel":
                    refuse_unread_head(names, lora)
            except InputError as error:
                raise InputError(f"{path}.{error}") from error


def _check_judges(record: RunRecord, stage: StageRecord, path: str) -> None:
    """A reward model that was trained on 4-bit weights scores with them."""
    for ref in stage.inputs:
        if ref.stage is None or not ref.role.endswith(".judge"):
            continue
        judge = record.stage(ref.stage)
        if (judge.parameters.get("lora") or {}).get("quantization") is not None:
            field = (
                f"{path}.suites[{ref.role.split('.')[1]}].winRate.judge.stage: the lora.quantization of {judge.name}"
            )
            refuse_without_device(field, cuda=_has_cuda(record, stage))


def _check_rollout(record: RunRecord, stage: StageRecord, field: str) -> None:
    """vLLM is no part of every trainer image, and needs a device."""
    if (stage.parameters.get("rollout") or {}).get("engine") == "vllm":
        from plumbline_trainer.rollout.vllm import find_executable

        find_executable(field, os.environ, cuda=_has_cuda(record, stage))


def names_of(context: StageContext, model: ExternalInput, digest: str) -> ModuleNames:
    """The modules of a model; found once per content, because building even an empty model takes seconds."""
    key = digest_of(["modules", digest, NAMES_VERSION])
    place = uris.join(context.namespace_root, f"{CACHE_FOLDER}/modules-{key[:32]}.json")
    known = read_json(context.store, place)
    if isinstance(known, dict):
        try:
            return ModuleNames(**{name: tuple(values) for name, values in known.items()})
        except TypeError:
            pass
    from plumbline_trainer.models.loading import load_skeleton
    from plumbline_trainer.models.selection import module_names

    names = module_names(load_skeleton(small_files(context, model, digest)))
    context.store.put_bytes(place, json.dumps(dataclasses.asdict(names)).encode())
    return names


def _has_cuda(record: RunRecord, stage: StageRecord) -> bool:
    """Whether the stage's pods ask for an accelerator; in a local run, whether this machine has one."""
    if record.runtime is not None:
        return bool(stage.resources.gpus_per_node)
    import torch

    return torch.cuda.is_available()
