"""One call of a local run: from a manifest file to a runner that is ready to go."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plumbline_api.check import check
from plumbline_api.pipeline import AlignmentPipeline, Storage
from plumbline_api.runtime import RewardEndpoint
from plumbline_operator.policies.identity import spec_digest
from plumbline_operator.settings import PlanSettings

from plumbline_cli.commands.version import installed_version
from plumbline_cli.exits import CommandError
from plumbline_cli.local.sources import choose_storage, count_gpus, localise
from plumbline_cli.local.state import DEFAULT_STORAGE, LocalState, RunFolder, folder_to_run
from plumbline_cli.manifests import STDIN, Document, InvalidManifestError, parse_pipeline, read_local_documents


@dataclass(frozen=True, slots=True)
class Session:
    """A manifest, the folder that takes its results, and the state to begin with."""

    pipeline: AlignmentPipeline
    folder: RunFolder
    state: LocalState
    storage: Path
    endpoints: tuple[RewardEndpoint, ...] = ()
    """Reward endpoints of the runtime that stands in the manifest's file."""

    @property
    def settings(self) -> PlanSettings:
        """What `plan` is told: a laptop waits less than a cluster."""
        return PlanSettings(
            operator_version=installed_version(),
            backoff_base_seconds=1.0,
            backoff_cap_seconds=30.0,
            progress_interval_seconds=2.0,
            result_wait_seconds=0.0,
            local_storage=Storage(uri=self.storage.as_uri()),
            local_endpoints=self.endpoints,
        )


def open_session(
    file: str,
    *,
    storage: Path | None = None,
    name: str | None = None,
    namespace: str | None = None,
    pipeline_name: str | None = None,
) -> Session:
    """Read and check a manifest and find the folder of its run.

    Args:
        file: Manifest file.
        storage: Folder for results; see `choose_storage`.
        name: Name of the run in place of metadata.name.
        namespace: Namespace in place of metadata.namespace.
        pipeline_name: Which pipeline of the file.

    Raises:
        CommandError: if the file cannot be read or does not hold a valid pipeline.
    """
    document, endpoints = read_local_documents(file, pipeline_name)
    base = Path.cwd() if file == STDIN else Path(file).absolute().parent
    body, notes = localise(document.body, base, gpus=count_gpus())
    root, remarks = choose_storage(document.body, base, storage, DEFAULT_STORAGE)
    if root.exists() and not root.is_dir():
        raise CommandError(f"{root} is a file; results need a folder. Name one with --storage")
    local = Document(document.file, _named(body, name, namespace), document.node)
    pipeline = parse_pipeline(local)
    if problems := check(pipeline, place="local", local_endpoints=endpoints):
        raise InvalidManifestError(local.locate(problems))
    if pipeline.spec.suspend:
        raise CommandError(f"{file}: spec.suspend is true, so nothing would run; set it to false or leave it out")
    space = pipeline.metadata.namespace or "default"
    folder = folder_to_run(root, space, pipeline.metadata.name, pipeline)
    before = folder.load()
    digest = spec_digest(local.body)
    generation = 1 if before is None else before.generation + (before.spec_digest != digest)
    local.body["metadata"] |= {"uid": folder.uid, "generation": generation, "namespace": space}
    chosen = {"--name": name, "--namespace": namespace, "--pipeline": pipeline_name}
    state = LocalState(
        manifest="" if file == STDIN else str(Path(file).absolute()),
        options=[part for option, value in chosen.items() if value is not None for part in (option, value)],
        generation=generation,
        spec_digest=digest,
        body=local.body,
        notes=[*notes, *remarks],
    )
    return Session(parse_pipeline(local), folder, state, root, endpoints)


def command_to_go_on(folder: RunFolder, state: LocalState) -> str:
    """What to type in the present folder so that a run goes on: the same manifest, name and storage."""
    parts = ["plumbline", "run", shown(Path(state.manifest)) if state.manifest else STDIN, *state.options]
    base = Path(state.manifest).parent if state.manifest else Path.cwd()
    # The body of the state is as the manifest was, so that its storage is chosen again as it was.
    if choose_storage(state.body, base, None, DEFAULT_STORAGE)[0] != folder.storage:
        parts += ["--storage", shown(folder.storage)]
    return shlex.join(parts)


def shown(path: Path) -> str:
    """A path as people write it: relative where it lies below the current folder."""
    here = Path.cwd()
    try:
        return str(path.relative_to(here)) if here != Path(here.anchor) else str(path)
    except ValueError:
        return str(path)


def _named(body: dict[str, Any], name: str | None, namespace: str | None) -> dict[str, Any]:
    metadata = body.get("metadata")
    if not isinstance(metadata, dict):
        return body
    given = {"name": name, "namespace": namespace}
    return {**body, "metadata": {**metadata, **{key: value for key, value in given.items() if value is not None}}}
