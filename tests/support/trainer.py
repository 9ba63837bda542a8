"""Run trainer stages in tests: in this process, or as the launcher's subprocess, over file:// storage."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plumbline_api.artifacts import ArtifactKind
from plumbline_api.layout import stage_root
from plumbline_api.methods import DEFAULT_LEARNING_RATES
from plumbline_api.pipeline import AlignmentPipeline, Storage
from plumbline_api.record import ExternalInput, PipelineIdentity, RunRecord, fingerprints
from plumbline_api.resolve import resolve
from plumbline_api.runtime import RewardEndpoint
from plumbline_api.stagerun import STAGE_ENV, TERMINATION_LOG_ENV, StageInput, StageResult, StageRun
from plumbline_api.stages import STAGE_TYPES, yields_of
from plumbline_trainer.context import StageContext, StopSignal
from plumbline_trainer.progress import ProgressReporter
from plumbline_trainer.storage.manifests import Manifest, read_manifest
from plumbline_trainer.storage.objects import open_store
from plumbline_trainer.worker import execute, make_log

REPOSITORY = Path(__file__).resolve().parents[2]
NAMESPACE = "team-a"


def identity(name: str = "pipeline", uid: str = "uid-1") -> PipelineIdentity:
    return PipelineIdentity(name=name, namespace=NAMESPACE, uid=uid, generation=1)


def storage_at(folder: Path) -> Storage:
    return Storage(uri=f"file://{folder}/storage")


def stage_run(
    folder: Path,
    type_: str = "sft",
    *,
    parameters: Mapping[str, Any] | None = None,
    inputs: Sequence[StageInput] = (),
    fingerprint: str | None = None,
    attempt: int = 1,
    processes: int = 1,
    storage: Storage | None = None,
    role: str = "stage",
    stage: str | None = None,
) -> StageRun:
    """A StageRun of any stage with storage under `folder`; parameters in wire form, as the record holds them."""
    content = json.dumps([type_, dict(parameters or {}), [item.to_wire() for item in inputs]], sort_keys=True)
    kind = STAGE_TYPES.get(type_)
    return StageRun.model_validate(
        {
            "role": role,
            "pipeline": identity().to_wire(),
            "stage": stage or type_,
            "type": type_,
            "attempt": attempt,
            "fingerprint": fingerprint or hashlib.sha256(content.encode()).hexdigest(),
            "numericsVersion": 1 if kind is None else kind.numerics_version,
            "parameters": dict(parameters or {}),
            "inputs": [item.to_wire() for item in inputs],
            "storage": (storage or storage_at(folder)).to_wire(),
            "processesPerNode": processes,
        }
    )


def stage_context(folder: Path, run: StageRun | None = None) -> StageContext:
    """A context for one rank in this process."""
    run = run or stage_run(folder)
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    store = open_store(run.storage)
    context = StageContext(
        run=run,
        store=store,
        progress=ProgressReporter(environment={}),
        stop=StopSignal(),
        scratch=scratch,
        log=make_log(),
    )
    context.progress = ProgressReporter(
        store=store, run_root=context.run_root, scratch=scratch, environment={}, log=context.log
    )
    return context


def run_in_process(folder: Path, run: StageRun) -> tuple[StageResult, int]:
    """Run a stage as the worker does, in this process."""
    return execute(stage_context(folder, run))


@dataclass
class Launched:
    """How a launched attempt ended."""

    exit_code: int
    result: StageResult
    output: str


def launch_environment(run: StageRun, folder: Path, **extra: str) -> dict[str, str]:
    """The environment of a launcher subprocess."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(REPOSITORY / name) for name in ("operator", "trainer_image", "tests")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": str(folder),
        STAGE_ENV: run.to_json(),
        TERMINATION_LOG_ENV: str(folder / "termination"),
        **extra,
    }


def start_launcher(run: StageRun, folder: Path, **extra: str) -> subprocess.Popen[str]:
    """Start an attempt as a subprocess; the caller waits for it."""
    return subprocess.Popen(
        [sys.executable, "-m", "plumbline_trainer.launcher"],
        env=launch_environment(run, folder, **extra),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish_launcher(process: subprocess.Popen[str], folder: Path, timeout: float = 300) -> Launched:
    """Wait for a launched attempt and read its termination message."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"the trainer did not end within {timeout} s:\n{output}") from None
    message = (folder / "termination").read_text() if (folder / "termination").exists() else ""
    result = StageResult.from_message(message)
    assert result is not None, f"exit code {process.returncode}, message {message!r}, output:\n{output}"
    return Launched(process.returncode, result, output)


def launch(run: StageRun, folder: Path, timeout: float = 300, **extra: str) -> Launched:
    """Run an attempt as a subprocess to its end."""
    return finish_launcher(start_launcher(run, folder, **extra), folder, timeout)


def external(role: str, uri: str, *, name: str = "data", kind: str = "dataset", **settings: Any) -> StageInput:
    """An external input whose digest is not pinned; `settings` in wire form."""
    return StageInput(role=role, name=name, kind=kind, uri=uri, settings=settings)


def base_model(uri: str, role: str = "model") -> StageInput:
    return external(role, uri, name="base", kind="policy", storageDtype="auto")


def output_of(run: StageRun, role: str = "model") -> StageInput:
    """The input that stands for another stage's output."""
    kind = yields_of(run.type, run.parameters)
    assert kind is not ArtifactKind.DATASET
    return StageInput(role=role, name=run.stage, kind=kind.value, stage_type=run.type, fingerprint=run.fingerprint)


def manifest_of(run: StageRun) -> Manifest:
    """The committed manifest of a run."""
    root = stage_root(run.storage.uri, run.pipeline.namespace, run.type, run.fingerprint)
    found = read_manifest(open_store(run.storage), root)
    assert found is not None, f"nothing is committed in {root}"
    return found[0]


def output_folder(run: StageRun) -> Path:
    """The committed files of a run on file:// storage."""
    root = stage_root(run.storage.uri, run.pipeline.namespace, run.type, run.fingerprint)
    return Path(root.removeprefix("file://")) / manifest_of(run).folder


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows; the URI of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"file://{path}"


def parameters_of(model: Any, *, seed: int = 0, **resolved: Any) -> dict[str, Any]:
    """Parameters as a record holds them: the model's wire form, the seed, learning rate and precision resolved."""
    found: dict[str, Any] = model.to_wire() | {"seed": seed} | resolved
    training = found.get("training")
    if training is not None:
        if training.get("precision", "auto") == "auto":
            training["precision"] = "float32"
        name = type(model).__name__
        with_lora, full = DEFAULT_LEARNING_RATES[name[:1].lower() + name[1:]]
        training.setdefault("learningRate", with_lora if "lora" in found else full)
    if "lora" in found:
        found["lora"].setdefault("alpha", 2.0 * found["lora"]["rank"])
    if found.get("precision") == "auto":
        found["precision"] = "float32"
    return found


@dataclass
class LocalPipeline:
    """A manifest resolved for file:// storage, stage by stage by hand: preflight first, then each stage."""

    body: dict[str, Any]
    folder: Path
    record: RunRecord = field(init=False)
    pins: list[str] = field(default_factory=list)
    endpoints: tuple[RewardEndpoint, ...] = ()

    def __post_init__(self) -> None:
        pipeline = AlignmentPipeline.parse(self.body)
        record = resolve(
            pipeline,
            None,
            operator_version="test",
            place="local",
            local_storage=storage_at(self.folder),
            local_endpoints=self.endpoints,
        )
        uid = self.body["metadata"].get("uid", "uid-1")
        self.record = record.model_copy(update={"pipeline": identity(pipeline.metadata.name, uid)})

    def preflight(self, attempt: int = 1) -> StageRun:
        return StageRun(
            role="preflight",
            pipeline=self.record.pipeline,
            stage="preflight",
            type="preflight",
            attempt=attempt,
            fingerprint=self.record.digest(),
            storage=self.record.storage,
            record=self.record,
        )

    def externals(self) -> list[ExternalInput]:
        return self.record.external_inputs

    def stage(self, name: str, *, attempt: int = 1, role: str = "stage", processes: int = 1) -> StageRun:
        """What a declared stage is told, once `pins` are known."""
        found, stage = fingerprints(self.record, self.pins), self.record.stage(name)
        inputs = []
        for ref in stage.inputs:
            if ref.stage is not None:
                producer = self.record.stage(ref.stage)
                inputs.append(
                    StageInput(
                        role=ref.role,
                        name=producer.name,
                        kind=yields_of(producer.type, producer.parameters).value,
                        stage_type=producer.type,
                        fingerprint=found[producer.name],
                    )
                )
            else:
                assert ref.external is not None
                outside = self.record.external_inputs[ref.external]
                inputs.append(
                    StageInput(
                        role=ref.role,
                        name="base" if outside.name == "model" else outside.name.removeprefix("dataset/"),
                        kind=outside.kind,
                        uri=outside.uri,
                        digest=self.pins[ref.external],
                        settings=outside.settings,
                    )
                )
        return StageRun(
            role=role,
            pipeline=self.record.pipeline,
            stage=name,
            type=stage.type,
            attempt=attempt,
            fingerprint=found[name],
            numerics_version=stage.numerics_version,
            parameters=stage.parameters,
            inputs=inputs,
            storage=self.record.storage,
            processes_per_node=processes,
        )
