"""`make bench`: measure what docs/benchmarks.md publishes, and write it there.

Name parts to measure only them: `python -m tests.bench transfer quickstart handover`.
"""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
PARTS = {
    "handover": (
        "Operator",
        "tests/bench/handover.py",
        "real API server, Jobs ended by a fake kubelet, operator as a process",
    ),
    "transfer": ("Checkpoints against a raw copy", "tests/bench/transfer.py", "a real S3 server on this machine"),
    "quickstart": ("Quickstart", "tests/bench/quickstart.py", "`make quickstart` from empty storage, then again"),
}
PAGE = ROOT / "docs" / "benchmarks.md"


def main(names: list[str]) -> int:
    """Measure the named parts (all by default) and put their tables into the page; other tables stay."""
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.stderr.write(f"no benchmark {', '.join(unknown)}; known: {', '.join(PARTS)}\n")
        return 2
    for name in names or list(PARTS):
        rows = importlib.import_module(f"bench.{name}").measure()
        section = _section(name, rows)
        sys.stdout.write(section + "\n")
        _replace(name, section)
    return 0


def _section(name: str, rows: list[dict[str, str]]) -> str:
    title, source, how = PARTS[name]
    header = list(rows[0])
    lines = [f"## {title}", "", f"`make bench` ({source}): {how}.", ""]
    lines += [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join(row.get(key, '') for key in header)} |" for row in rows]
    libraries = ", ".join(f"{n} {version(n)}" for n in ("torch", "transformers", "kopf", "boto3"))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines += [
        "",
        f"{today}; {os.cpu_count()} cores ({platform.machine()}); Python {platform.python_version()}, {libraries}.",
        "",
    ]
    return "\n".join(lines)


def _replace(name: str, section: str) -> None:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else _INTRODUCTION
    block = f"{begin}\n{section}{end}\n"
    if begin in text:
        head, _, rest = text.partition(begin)
        text = head + block + rest.partition(f"{end}\n")[2]
    else:
        text = text.rstrip("\n") + "\n\n" + block
    PAGE.write_text(text, encoding="utf-8")


_INTRODUCTION = """# Benchmarks

Every figure here was measured by the command named above it and written by that command. Machines differ and are shared: speeds are
given as ratios within one run where something can be compared.
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
