"""What a run would do: preflight for real, then the same planner, and nothing started."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plumbline_api.names import PREFLIGHT
from plumbline_api.record import RunRecord, StageRecord
from plumbline_api.status import StageStatus
from plumbline_operator.policies.failures import FINAL_REASONS
from plumbline_operator.snapshot import PlannedEvent

from plumbline_cli.local.launch import TrainerLauncher
from plumbline_cli.local.runner import LocalRunner, RunView
from plumbline_cli.local.session import Session
from plumbline_cli.local.state import LocalState, RunFolder

PLAN_FILE = "plan.json"


@dataclass(frozen=True, slots=True)
class StageForecast:
    """What would happen to one stage."""

    record: StageRecord
    is_cached: bool
    fingerprint: str | None
    why: str | None = None
    """Why it is or is not in storage, in preflight's words."""
    estimate: dict[str, Any] = field(default_factory=dict)
    """Steps, tokens, memoryBytes and gpuHours, as far as preflight can tell."""

    def to_wire(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "name": self.record.name,
            "type": self.record.type,
            "action": "cached" if self.is_cached else "run",
            "fingerprint": self.fingerprint,
            "why": self.why,
            "estimate": self.estimate,
            "parameters": self.record.parameters,
            "dependsOn": self.record.depends_on,
        }


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run would do."""

    name: str
    storage: Path
    notes: list[str]
    """What preflight found: rows, tokens, memory."""
    problem: str | None
    """Why nothing would run, in preflight's words."""
    is_input_wrong: bool
    """Whether the problem is the user's to mend."""
    stages: list[StageForecast]
    inputs: list[dict[str, Any]]
    """External inputs and their digests."""
    datasets: list[dict[str, Any]]
    """Rows, tokens and splits of each dataset."""
    models: dict[str, Any]
    """Facts of each model."""

    def to_wire(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "name": self.name,
            "storage": str(self.storage),
            "preflight": {"notes": self.notes, "problem": self.problem},
            "inputs": self.inputs,
            "datasets": self.datasets,
            "models": self.models,
            "stages": [stage.to_wire() for stage in self.stages],
        }


def make_forecast(session: Session) -> Forecast:
    """Run preflight and see what `plan` makes of it. Leaves no trace of a run: its files are temporary."""
    with tempfile.TemporaryDirectory(prefix="plumbline-plan-") as temporary:
        before = session.folder
        folder = RunFolder(Path(temporary), before.namespace, before.name, before.uid)
        runner = LocalRunner(
            folder=folder,
            state=session.state,
            settings=session.settings,
            launch=TrainerLauncher(folder),
            observer=_Silent(),
        )
        runner.run(until=_has_ended)
        return _forecast(session, runner)


def _has_ended(state: LocalState) -> bool:
    entry = state.status.stage_named(PREFLIGHT)
    return entry is not None and entry.phase in ("Succeeded", "Failed")


def _forecast(session: Session, runner: LocalRunner) -> Forecast:
    state, record = runner.state, runner.record
    entry = state.status.stage_named(PREFLIGHT)
    result = next((job.result for job in reversed(state.jobs) if job.role == "preflight" and job.result), None)
    failed = entry is not None and entry.phase == "Failed"
    problem = (
        ": ".join(part for part in (entry.reason, entry.message) if part) if entry is not None and failed else None
    )
    plan = _read_plan(session) if not failed else {}
    return Forecast(
        name=session.folder.name,
        storage=session.storage,
        notes=list(result.preflight.notes) if result is not None and result.preflight is not None else [],
        problem=problem,
        is_input_wrong=entry is not None and entry.reason in FINAL_REASONS,
        stages=_stages(record, state, plan) if record is not None and not failed else [],
        inputs=[pin.to_wire() for pin in state.status.inputs],
        datasets=plan.get("datasets", []),
        models=plan.get("models", {}),
    )


def _read_plan(session: Session) -> dict[str, Any]:
    """What preflight wrote beside the run: more than fits its message."""
    try:
        found = json.loads((session.folder.path / PLAN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _stages(record: RunRecord, state: LocalState, plan: dict[str, Any]) -> list[StageForecast]:
    entries: dict[str, StageStatus] = {entry.name: entry for entry in state.status.stages}
    told = {item.get("name"): item for item in plan.get("stages", [])}
    return [
        StageForecast(
            stage,
            entries[stage.name].cached,
            entries[stage.name].fingerprint,
            told.get(stage.name, {}).get("why"),
            told.get(stage.name, {}).get("estimate", {}),
        )
        for stage in record.stages
    ]


class _Silent:
    def show(self, view: RunView) -> None:
        """Nothing is shown while a forecast is made."""

    def tell(self, event: PlannedEvent) -> None:
        """Its events are about a run that does not happen."""
