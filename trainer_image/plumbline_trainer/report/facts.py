"""Everything that is known of a run when it has ended, read from storage; what is missing is listed, never guessed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from plumbline_api import layout
from plumbline_api.artifacts import ArtifactKind
from plumbline_api.errors import InputError
from plumbline_api.online import ABORTED_REASON, ONLINE_STAGES
from plumbline_api.record import RunRecord, StageRecord
from plumbline_api.stagerun import StageOutcome, StageRun
from plumbline_api.stages import yields_of

from plumbline_trainer.errors import TransientError
from plumbline_trainer.storage import uris
from plumbline_trainer.storage.manifests import Manifest, read_json, read_manifest
from plumbline_trainer.storage.objects import ObjectStore

CURVES = "metrics.jsonl"
EVALUATION = "report.json"
HELD_OUT = "evaluation.json"
PLAN = "plan.json"
MONITORS = "monitors.json"
WITH_OUTPUT = frozenset({"GateFailed", ABORTED_REASON})
"""Reasons of failed stages whose output is there, but not good enough."""
CURVE_BYTES_MAX = 64 * 1024 * 1024


@dataclass(frozen=True)
class Point:
    """What a stage reported at one step."""

    step: int
    metrics: dict[str, float]


@dataclass
class StageFacts:
    """One declared stage."""

    record: StageRecord
    outcome: StageOutcome | None = None
    manifest: Manifest | None = None
    digest: str | None = None
    """SHA-256 of the manifest."""
    output_uri: str | None = None
    """Folder of the output's files."""
    points: list[Point] = field(default_factory=list)
    evaluation: dict[str, Any] | None = None
    """report.json of an evaluate stage."""
    held_out: dict[str, Any] | None = None
    """evaluation.json of a reward model; None where no row was held out."""
    monitors: dict[str, Any] | None = None
    """monitors.json of a stage that samples."""

    @property
    def name(self) -> str:
        """Its name."""
        return self.record.name

    @property
    def phase(self) -> str:
        """How it ended; Pending where nobody says."""
        return "Pending" if self.outcome is None else self.outcome.phase

    @property
    def succeeded(self) -> bool:
        """Whether it did."""
        return self.phase == "Succeeded"

    @property
    def aborted(self) -> str | None:
        """Why it stopped by its own abort rules, in words; None where it did not."""
        if self.outcome is None or self.outcome.reason != ABORTED_REASON:
            return None
        return self.outcome.message or "its abort rules"

    @property
    def yields_policy(self) -> bool:
        """Whether its output is a policy."""
        return yields_of(self.record.type, self.record.parameters) is ArtifactKind.POLICY

    @property
    def yields_reward_model(self) -> bool:
        """Whether its output is a reward model."""
        return yields_of(self.record.type, self.record.parameters) is ArtifactKind.REWARD_MODEL

    @property
    def metrics(self) -> dict[str, float]:
        """Its figures."""
        return {} if self.manifest is None else self.manifest.metrics


@dataclass
class RunFacts:
    """A run."""

    record: RunRecord
    pins: list[str]
    stages: list[StageFacts]
    steps: list[StageOutcome]
    """Outcomes of implicit steps such as preflight."""
    root: str
    """Folder of the run's own documents."""
    plan: dict[str, Any] | None = None
    gaps: list[str] = field(default_factory=list)
    """What could not be read, in words."""

    @property
    def name(self) -> str:
        """Name of the pipeline."""
        return self.record.pipeline.name

    @property
    def failures(self) -> list[StageOutcome]:
        """What failed, implicit steps first."""
        return [item for item in self.outcomes if item.phase == "Failed"]

    @property
    def outcomes(self) -> list[StageOutcome]:
        """Every outcome, implicit steps first."""
        return self.steps + [stage.outcome for stage in self.stages if stage.outcome is not None]

    @property
    def succeeded(self) -> bool:
        """Whether every stage did."""
        return not self.failures and all(stage.succeeded for stage in self.stages)

    @property
    def final(self) -> StageFacts | None:
        """The last stage, in declared order, that yielded a policy."""
        return next((stage for stage in reversed(self.stages) if stage.succeeded and stage.yields_policy), None)

    @property
    def evaluations(self) -> list[StageFacts]:
        """Stages that measured something."""
        return [stage for stage in self.stages if stage.evaluation is not None]

    def stage(self, name: str) -> StageFacts | None:
        """The stage of a name."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def pin(self, name: str) -> str | None:
        """Digest of an external input."""
        names = [item.name for item in self.record.external_inputs]
        index = names.index(name) if name in names else len(self.pins)
        return self.pins[index] if index < len(self.pins) else None


def gather(store: ObjectStore, run: StageRun) -> RunFacts:
    """Read everything that storage holds of a run.

    Raises:
        InputError: if the run record is not given.
    """
    record = run.record
    if record is None:
        raise InputError("finalize was started without the run record")
    declared = {stage.name for stage in record.stages}
    pipeline = record.pipeline
    root = layout.pipeline_root(record.storage.uri, pipeline.namespace, pipeline.name, pipeline.uid)
    facts = RunFacts(
        record=record,
        pins=list(run.pins),
        stages=[StageFacts(stage) for stage in record.stages],
        steps=[item for item in run.outcomes if item.name not in declared],
        root=root,
        plan=read_json(store, uris.join(root, PLAN)),
    )
    by_name = {item.name: item for item in run.outcomes}
    for stage in facts.stages:
        stage.outcome = by_name.get(stage.name)
        if stage.outcome is not None and stage.outcome.fingerprint is not None:
            facts.gaps += _read_stage(store, facts, stage, stage.outcome.fingerprint)
    return facts


def _read_stage(store: ObjectStore, facts: RunFacts, stage: StageFacts, fingerprint: str) -> Iterator[str]:
    pipeline, storage = facts.record.pipeline, facts.record.storage.uri
    root = layout.stage_root(storage, pipeline.namespace, stage.record.type, fingerprint)
    own = layout.stage_run_root(storage, pipeline.namespace, stage.record.type, fingerprint, pipeline.uid)
    try:
        stage.points = read_curve(store, root, own)
    except (InputError, TransientError, OSError) as error:
        yield f"the curves of {stage.name}: {error}"
    if not stage.succeeded and (stage.outcome is None or stage.outcome.reason not in WITH_OUTPUT):
        return
    try:
        found = read_manifest(store, root)
    except (InputError, TransientError, OSError) as error:
        yield f"the manifest of {stage.name}: {error}"
        return
    if found is None:
        yield f"the output of {stage.name} is not in storage"
        return
    stage.manifest, stage.digest = found
    stage.output_uri = uris.join(root, stage.manifest.folder)
    try:
        if stage.record.type == "evaluate":
            stage.evaluation = _read_document(store, stage, EVALUATION)
            if stage.evaluation is None:
                raise InputError(f"its output holds no {EVALUATION}")
        elif stage.record.type in ONLINE_STAGES:
            stage.monitors = _read_document(store, stage, MONITORS)
        elif stage.yields_reward_model:
            stage.held_out = _read_document(store, stage, HELD_OUT)
    except (InputError, TransientError, OSError, ValueError) as error:
        yield f"the figures of {stage.name}: {error}"


def _read_document(store: ObjectStore, stage: StageFacts, name: str) -> dict[str, Any] | None:
    """A JSON file of a stage's output, verified; None where the output holds none of that name."""
    assert stage.manifest is not None
    assert stage.output_uri is not None
    entry = next((file for file in stage.manifest.files if file.path == name), None)
    if entry is None:
        return None
    data = store.get_bytes(uris.join(stage.output_uri, name))
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise InputError(f"{name} is damaged: it does not match its SHA-256")
    document = json.loads(data)
    if not isinstance(document, dict):
        raise InputError(f"{name} holds no object")
    return document


def read_curve(store: ObjectStore, root: str, own: str) -> list[Point]:
    """The points of this run's attempts, or of the run that computed a cached output."""
    try:
        return parse_curve(store.get_bytes(uris.join(own, CURVES)))
    except FileNotFoundError:
        pass
    found = [item for item in store.list(f"{root}/runs/") if item.uri.endswith(f"/{CURVES}")]
    usable = [item for item in found if item.size <= CURVE_BYTES_MAX]
    if not usable:
        return []
    return parse_curve(store.get_bytes(max(usable, key=lambda item: (item.size, item.uri)).uri))


def parse_curve(data: bytes) -> list[Point]:
    """Points by step, each step once: what was reported last holds, since a resumed attempt repeats steps."""
    points: dict[int, dict[str, float]] = {}
    for line in data.decode(errors="replace").splitlines():
        try:
            item = json.loads(line)
            step, metrics = int(item["step"]), dict(item["metrics"])
        except (ValueError, KeyError, TypeError):
            continue
        kept = {str(k): float(v) for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v)}
        points.setdefault(step, {}).update(kept)
    return [Point(step, points[step]) for step in sorted(points)]


def series(points: Sequence[Point], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    chosen = [(point.step, point.metrics[name]) for point in points if name in point.metrics]
    return [step for step, _ in chosen], [value for _, value in chosen]
