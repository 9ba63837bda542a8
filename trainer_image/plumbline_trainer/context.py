"""What a stage is given and what it gives back."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plumbline_api import layout
from plumbline_api.stagerun import PreflightFindings, StageInput, StageRun

from plumbline_trainer.errors import InputError
from plumbline_trainer.progress import ProgressReporter
from plumbline_trainer.storage.objects import ObjectStore

if TYPE_CHECKING:
    import torch

    from plumbline_trainer.storage.checkpoints import CheckpointUploads


class StopSignal:
    """Whether SIGTERM (or Ctrl-C) came. Stages look at it at every optimizer-step boundary."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        """Ask the stage to write a checkpoint and stop."""
        self.requested = True


@dataclass
class StageContext:
    """Everything a stage needs from its surroundings."""

    run: StageRun
    store: ObjectStore
    """Takes full URIs: storage, datasets and models alike."""
    progress: ProgressReporter
    stop: StopSignal
    scratch: Path
    """Private temporary folder, shared by the ranks of a node."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("plumbline"))
    manifest_digests: dict[str, str] = field(default_factory=dict)
    """Digests of the manifests that were read as inputs, by root URI; they become the parents of the output."""
    uploads: CheckpointUploads | None = None
    """Checkpoints on their way to storage; made by the first save."""

    @cached_property
    def device(self) -> torch.device:
        """The accelerator of this rank, or the CPU. torch is imported here first: CPU jobs start without it."""
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    @property
    def output_root(self) -> str:
        """URI under which the output of this piece of work lies."""
        run = self.run
        return layout.stage_root(run.storage.uri, run.pipeline.namespace, run.type, run.fingerprint)

    @property
    def run_root(self) -> str:
        """URI of checkpoints, metrics, logs and results of this pipeline's attempts."""
        run = self.run
        return layout.stage_run_root(
            run.storage.uri, run.pipeline.namespace, run.type, run.fingerprint, run.pipeline.uid
        )

    @property
    def pipeline_root(self) -> str:
        """URI of plan.json, lineage.json, the report and the model card."""
        identity = self.run.pipeline
        return layout.pipeline_root(self.run.storage.uri, identity.namespace, identity.name, identity.uid)

    @property
    def namespace_root(self) -> str:
        """URI of everything of the namespace."""
        return layout.namespace_root(self.run.storage.uri, self.run.pipeline.namespace)

    def root_of(self, item: StageInput) -> str:
        """URI of the output that a stage input stands for."""
        assert item.stage_type is not None
        assert item.fingerprint is not None
        return layout.stage_root(self.run.storage.uri, self.run.pipeline.namespace, item.stage_type, item.fingerprint)

    def input(self, role: str) -> StageInput:
        """The input of a role, such as `model` or `dataset`.

        Raises:
            InputError: if the stage was started without it.
        """
        for item in self.run.inputs:
            if item.role == role:
                return item
        known = ", ".join(item.role for item in self.run.inputs) or "none"
        raise InputError(
            f'stage {self.run.stage} ({self.run.type}) was started without an input "{role}". Inputs: {known}'
        )

    def inputs_with(self, prefix: str) -> list[StageInput]:
        """The inputs whose role begins with a prefix, such as `suites.`."""
        return [item for item in self.run.inputs if item.role.startswith(prefix)]

    @property
    def is_main(self) -> bool:
        """Whether this rank reports and commits."""
        return self.rank == 0


@dataclass
class StageOutput:
    """What a stage yields on rank 0; the worker commits it. Other ranks may return the same or None."""

    folder: Path
    """Files of the output; all of them are uploaded."""
    kind: str
    """Artifact kind."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What readers of the artifact must know; goes into the manifest."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures; all into the manifest, the first 20 into the termination message."""
    tokens: int = 0
    first_step: int | None = None
    last_step: int | None = None
    preflight: PreflightFindings | None = None
    message: str = ""
    """One line for people."""
    manifest_digest: str | None = None
    """Manifest that is committed already; only `collect` knows one."""
