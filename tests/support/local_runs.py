"""Local runs with the fake trainer, for tests of the runner and of the commands that read its state."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from plumbline_cli.local.launch import TrainerLauncher
from plumbline_cli.local.runner import LocalRunner, RunView
from plumbline_cli.local.session import Session, open_session
from plumbline_operator.snapshot import PlannedEvent
from support import fake_trainer

FAKE_COMMAND = (sys.executable, fake_trainer.__file__)


def pipeline_body(**stage_fields: Any) -> dict[str, Any]:
    """sft → dpo → final, with fields added to the sft stage."""
    return {
        "apiVersion": "plumbline.dev/v1alpha1",
        "kind": "AlignmentPipeline",
        "metadata": {"name": "demo"},
        "spec": {
            "model": {"source": "bundled://smollm2-135m-instruct"},
            "datasets": [
                {"name": "questions", "source": "questions.jsonl", "format": "instruction"},
                {"name": "prefs", "source": "prefs.jsonl", "format": "preference"},
            ],
            "stages": [
                {"name": "sft", "sft": {"dataset": "questions", "lora": {"rank": 4}}, **stage_fields},
                {"name": "dpo", "dpo": {"dataset": "prefs", "lora": {"rank": 4}}},
                {"name": "final", "merge": {}},
            ],
        },
    }


def write_manifest(folder: Path, body: dict[str, Any] | None = None) -> Path:
    """The manifest as a file."""
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(body or pipeline_body(), sort_keys=False))
    return path


class Recorder:
    """An observer that keeps what it was shown, and may act on it."""

    def __init__(self) -> None:
        self.views: list[RunView] = []
        self.events: list[PlannedEvent] = []
        self.on_view = lambda _view: None

    def show(self, view: RunView) -> None:
        self.views.append(view)
        self.on_view(view)

    def tell(self, event: PlannedEvent) -> None:
        self.events.append(event)


def open_run(manifest: Path, storage: Path, behaviour: dict[str, Any] | None = None) -> Session:
    """A session on a storage folder whose fake stages behave as told."""
    storage.mkdir(exist_ok=True)
    (storage / "behaviour.json").write_text(json.dumps(behaviour or {}))
    return open_session(str(manifest), storage=storage)


def make_runner(
    session: Session, observer: Recorder | None = None, *, parallel: int = 1, command: Sequence[str] = FAKE_COMMAND
) -> LocalRunner:
    """A runner of fake trainers."""
    return LocalRunner(
        folder=session.folder,
        state=session.state,
        settings=session.settings,
        launch=TrainerLauncher(session.folder, command=command),
        observer=observer or Recorder(),
        parallel=parallel,
    )


def starts(storage: Path) -> list[dict[str, Any]]:
    """Every process that was started, in order."""
    return [json.loads(line) for line in (storage / "starts.jsonl").read_text().splitlines()]
