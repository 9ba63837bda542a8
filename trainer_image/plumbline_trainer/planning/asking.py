"""Preflight asks every reward endpoint once: a wrong URL, token or form shows before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from plumbline_api.record import RunRecord, StageRecord

from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.planning.datasets import as_input
from plumbline_trainer.planning.hits import Hit
from plumbline_trainer.planning.pins import Pin
from plumbline_trainer.planning.problems import Problems
from plumbline_trainer.planning.rewarding import rewards_of
from plumbline_trainer.rewards.endpoints import EndpointReward
from plumbline_trainer.rewards.interface import Candidate

if TYPE_CHECKING:
    from plumbline_trainer.context import StageContext

STAND_IN = "I do not know."
"""The answer to a prompt whose row has none."""


def ask_endpoints(
    context: StageContext, record: RunRecord, pins: Sequence[Pin], hits: Mapping[str, Hit], problems: Problems
) -> list[str]:
    """Have the first prompt of every stage that will run scored by its endpoints, each endpoint once.

    Returns:
        Which did not answer: they may be up by the time the stage runs, and it asks them again.
    """
    silent, asked = [], set()
    for index, stage in enumerate(record.stages):
        offered = {endpoint.name: endpoint for endpoint in record.endpoints_of(stage.name) or []}
        for path, _, reward in () if hits[stage.name].found else rewards_of(stage, index):
            endpoint = offered.get(reward.endpoint or "")
            if endpoint is None or endpoint.name in asked:
                continue
            asked.add(endpoint.name)
            with problems.collecting():
                try:
                    service = EndpointReward(endpoint, stop=context.stop, retries=0)
                    service.ask([_candidate(context, record, pins, stage)])
                except TransientError as error:
                    silent.append(f"{stage.name}: {error}")
                except InputError as error:
                    raise InputError(f"{path}.endpoint: {error}", reason=error.reason) from error
    return silent


def _candidate(context: StageContext, record: RunRecord, pins: Sequence[Pin], stage: StageRecord) -> Candidate:
    number = next(ref.external for ref in stage.inputs if ref.role == "prompts" and ref.external is not None)
    row = load_rows(context, as_input(record.external_inputs[number], pins[number].digest), "train")[0]
    reference = row.chosen.text if row.responses else None
    return Candidate(row.prompt, reference or STAND_IN, len((reference or STAND_IN).split()), reference, row.id)
