"""What `make bench` computes from its measurements, and that it notices a transfer that moved something else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from bench.quickstart import PeakMemory, stage_seconds
from bench.transfer import require_equal, row_of


def test_seconds_of_stages_come_from_the_status() -> None:
    status = {
        "stages": [
            {"name": "sft", "startTime": "2026-11-25T19:42:13Z", "completionTime": "2026-11-25T19:44:33Z"},
            {"name": "dpo", "startTime": "2026-11-25T19:44:33Z", "completionTime": "2026-11-25T19:44:34Z"},
        ]
    }
    assert stage_seconds(status) == [("sft", 140.0), ("dpo", 1.0)]


def test_memory_of_children_is_seen() -> None:
    """The parent holds nothing; its child holds 64 MiB until its input ends."""
    child = "import sys; held = b'x' * 2**26; print(len(held), flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    process = psutil.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == str(2**26).encode()
    peak = PeakMemory(process, every_seconds=0.01)
    peak.start()
    while peak.gibibytes == 0 and process.is_running():
        peak.join(0.01)
    process.communicate()
    peak.join(10)
    assert not peak.is_alive()
    assert 1 / 16 < peak.gibibytes < 1 / 4


def test_ratios_are_medians_of_rounds() -> None:
    row = row_of(
        "small",
        40,
        {"raw up": [1.0, 2.0, 9.0], "our up": [2.0, 2.0, 10.0], "raw down": [1.0] * 3, "our down": [0.5] * 3},
    )
    assert (row["up ÷ raw"], row["down ÷ raw"], row["rounds"]) == ("0.90", "2.00", "3")
    assert row["up, down (MiB/s)"] == "20 / 80"


@pytest.mark.parametrize("harm", ["flip", "leave out", "add"])
def test_an_incomplete_download_is_noticed(tmp_path: Path, harm: str) -> None:
    for name in ("source", "found"):
        (tmp_path / name).mkdir()
        for part in ("a", "b"):
            (tmp_path / name / part).write_bytes(part.encode() * 100)
    require_equal(tmp_path / "source", tmp_path / "found")
    victim = tmp_path / "found" / "b"
    if harm == "flip":
        victim.write_bytes(b"b" * 99 + b"c")
    elif harm == "leave out":
        victim.unlink()
    else:
        (tmp_path / "found" / "c").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"instead of"):
        require_equal(tmp_path / "source", tmp_path / "found")
