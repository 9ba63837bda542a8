"""Examples as the command runs them on this machine, with a tiny model in place of the one that their README makes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.tiny import save_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def copy_example(name: str, folder: Path) -> Path:
    """An example in a new folder, with a tiny model as its `file://model`."""
    shutil.copytree(EXAMPLES / name, folder, ignore=shutil.ignore_patterns("model", "runs"))
    save_model(folder / "model")
    return folder


def plumbline(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "plumbline_cli.main", *arguments],
        cwd=cwd,
        env=os.environ | {"NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def run_example(folder: Path, manifest: str = "pipeline.yaml") -> str:
    """What `plumbline run` says; it must end well."""
    ended = plumbline("run", manifest, cwd=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
