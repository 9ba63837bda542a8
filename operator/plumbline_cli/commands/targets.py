"""What FILE|NAME means: a local run by its manifest or its name, or a pipeline on a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plumbline_cli.exits import NOT_FOUND, CommandError

if TYPE_CHECKING:
    from plumbline_cli.cluster import Cluster
    from plumbline_cli.local.state import LocalState, RunFolder

FILE_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class LocalTarget:
    """A run on this machine."""

    folder: RunFolder
    state: LocalState

    @property
    def is_running(self) -> bool:
        """Whether a process runs it right now."""
        from plumbline_cli.local.lock import is_locked

        return is_locked(self.folder.lock_file)

    @property
    def command_to_go_on(self) -> str:
        """What to type so that it goes on."""
        from plumbline_cli.local.session import command_to_go_on

        return command_to_go_on(self.folder, self.state)

    def again(self) -> LocalTarget:
        """The target as it is now on disk."""
        state = self.folder.load()
        return self if state is None else LocalTarget(self.folder, state)


@dataclass(frozen=True, slots=True)
class ClusterTarget:
    """A pipeline on a cluster."""

    cluster: Cluster
    name: str

    def read(self) -> dict[str, Any]:
        """The object as the API server holds it."""
        return self.cluster.pipeline(self.name)


def is_file(target: str) -> bool:
    """Whether a target names a manifest file and not an object."""
    return target.endswith(FILE_SUFFIXES) or "/" in target or Path(target).is_file()


def find_target(
    target: str, *, storage: Path | None, namespace: str | None, context: str | None, pipeline: str | None = None
) -> LocalTarget | ClusterTarget:
    """The local run or the pipeline on the cluster that is meant.

    Raises:
        CommandError: if a local run is meant and there is none.
    """
    if is_file(target) or storage is not None:
        return _find_local(target, storage=storage, namespace=namespace, pipeline=pipeline)
    from plumbline_cli.cluster import Cluster

    return ClusterTarget(Cluster(context=context, namespace=namespace), target)


def find_cluster_target(target: str, *, namespace: str | None, context: str | None) -> ClusterTarget:
    """The pipeline on the cluster that is meant, for commands that only a cluster knows.

    Raises:
        CommandError: if a manifest file was named.
    """
    if is_file(target):
        raise CommandError(
            f"{target} is a file. Name a pipeline on the cluster; a local run is stopped with Ctrl-C and goes on "
            "with `plumbline run`"
        )
    from plumbline_cli.cluster import Cluster

    return ClusterTarget(Cluster(context=context, namespace=namespace), target)


def _find_local(target: str, *, storage: Path | None, namespace: str | None, pipeline: str | None) -> LocalTarget:
    from plumbline_cli.local.sources import choose_storage
    from plumbline_cli.local.state import DEFAULT_STORAGE, current_folder
    from plumbline_cli.manifests import parse_pipeline, read_pipeline_document

    space = namespace or "default"
    if is_file(target):
        document = read_pipeline_document(target, pipeline)
        metadata = parse_pipeline(document).metadata
        name, space = metadata.name, namespace or metadata.namespace or "default"
        root, _ = choose_storage(document.body, Path(target).absolute().parent, storage, DEFAULT_STORAGE)
    else:
        name, root = target, (storage or DEFAULT_STORAGE).absolute()
    folder = current_folder(root, space, name)
    state = folder.load() if folder is not None else None
    if folder is None or state is None:
        raise CommandError(
            f"there is no local run of {name} (namespace {space}) in {root}. "
            "Start one with `plumbline run FILE`, or say where it is with --storage",
            NOT_FOUND,
        )
    return LocalTarget(folder, state)
