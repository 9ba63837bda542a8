"""What a phase of a stage has freed goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
from pathlib import Path
from plumbline_trainer.engine.heap import release_freed

def resident():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])

parts = [bytearray(b"x") * 100_000 for _ in range(1000)]
above = bytearray(b"x") * 100_000  # in use: what lies below it is kept by glibc
del parts
kept = resident()
release_freed()
print(kept - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim; run it on a glibc system")
def test_memory_below_what_is_in_use_goes_back() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 80_000  # KiB of about 97,656
