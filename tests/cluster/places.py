"""Where the test cluster keeps things: sources, the cache that survives it, and the state that does not."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
REPOSITORY = SOURCES.parent.parent
STATE_VARIABLE = "PLUMBLINE_CLUSTER_STATE"
CACHE_VARIABLE = "PLUMBLINE_CACHE"


def cache_root() -> Path:
    """Folder for what is expensive to make again; safe to delete while no cluster runs."""
    override = os.environ.get(CACHE_VARIABLE)
    return Path(override).expanduser().resolve() if override else Path.home() / ".cache" / "plumbline"


def default_state_dir() -> Path:
    """State folder of the cluster that `make cluster-up` starts, unless the environment names another."""
    override = os.environ.get(STATE_VARIABLE)
    return Path(override).expanduser().resolve() if override else REPOSITORY / ".cluster"


def sessions_root() -> Path:
    """Folder of the clusters that test sessions start for themselves, one state folder each."""
    return cache_root() / "sessions"


def content_key(parts: Iterable[str | bytes], files: Iterable[Path] = (), relative_to: Path = REPOSITORY) -> str:
    """Hash of texts and files (path and content, in path order) that names a cached output; 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    for file in sorted(files):
        data = file.read_bytes()
        name = str(file.relative_to(relative_to)).encode()
        digest.update(len(name).to_bytes(8, "big") + name + len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes for the length of the block; waits for the present holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _owner_file() -> Path:
    return cache_root() / "node-owner"


def load_owner() -> Path | None:
    """State folder of the cluster that has this machine's node and containerd's root."""
    file = _owner_file()
    return Path(file.read_text().strip()) if file.exists() else None


def write_owner(folder: Path) -> None:
    _owner_file().write_text(f"{folder}\n")


def remove_owner() -> None:
    _owner_file().unlink(missing_ok=True)
