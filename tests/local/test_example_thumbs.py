"""examples/05-thumbs by the command and the real trainer on this machine, twice."""

import json
from pathlib import Path

import pytest
from support.examples import copy_example, run_example

# Seconds on a machine of its own; a busy one needs patience.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_thumbs_are_learnt_and_a_second_run_with_another_weight_needs_no_reference_pass(tmp_path: Path) -> None:
    folder = copy_example("05-thumbs", tmp_path / "example")

    def manifests() -> list[Path]:
        return sorted(folder.glob("runs/default/kto/*/manifest.json"))

    output = run_example(folder)
    assert "thumbs: unpaired, 42 rows" in output
    [path] = manifests()
    metrics = json.loads(path.read_text())["metrics"]
    assert metrics["evalLossStart"] == pytest.approx(0.55, abs=0.06), "½ of the mean weight"
    assert metrics["loss"] < metrics["evalLossStart"]
    assert metrics["rewardAccuracy"] > 0.6
    packs = sorted(folder.glob("runs/default/references/*/*/totals.safetensors"))
    assert len(packs) == 1

    changed = (folder / "pipeline.yaml").read_text().replace("undesirableWeight: 1.2", "undesirableWeight: 1.1")
    (folder / "again.yaml").write_text(changed)
    run_example(folder, "again.yaml")
    assert len(manifests()) == 2
    assert sorted(folder.glob("runs/default/references/*/*/totals.safetensors")) == packs
    [log] = {
        log.read_text()
        for log in folder.glob("runs/default/kto/*/runs/*/logs/attempt-1.txt")
        if "of" in log.read_text() and str(path.parent) not in str(log)
    }
    found, wanted = log.partition("reference values: ")[2].split(" responses", 1)[0].split(" of ")
    assert found == wanted
