"""examples/01-quickstart as a user runs it, and what it promises: a visible effect, and a second call in seconds."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def run(folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    command = [sys.executable, "-m", "plumbline_cli.main", "run", "pipeline.yaml"]
    environment = os.environ | {"NO_COLOR": "1"}
    del environment["OMP_NUM_THREADS"]  # of tests; a user's run takes what there is
    started = time.monotonic()
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return ended, time.monotonic() - started


def test_quickstart(tmp_path):
    folder = tmp_path / "quickstart"
    shutil.copytree(ROOT / "examples" / "01-quickstart", folder)
    first, seconds = run(folder)
    assert first.returncode == 0, first.stdout + first.stderr
    [summary_file] = folder.glob("runs/default/pipelines/quickstart/*/summary.json")
    summary = json.loads(summary_file.read_text())
    rows = {row["metric"]: row for row in summary["rows"]}
    policy = summary["columns"][-1]

    win_rate = rows["winRate"]["values"][policy]
    assert win_rate["lower"] > 0.5, "the whole interval lies above one half"
    accuracy = rows["preferenceAccuracy"]["values"]
    assert accuracy[policy]["value"] > accuracy["base"]["value"]
    perplexity = rows["perplexity"]["values"]
    assert perplexity[policy]["value"] < perplexity["base"]["value"]
    assert summary_file.with_name("report.html").stat().st_size > 10_000

    second, seconds_again = run(folder)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "stages found in storage" in second.stdout
    assert seconds_again < seconds / 4
