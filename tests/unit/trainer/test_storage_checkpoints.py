"""Checkpoints: the newest whole one wins, whatever was interrupted or damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plumbline_trainer.context import StageContext
from plumbline_trainer.errors import TransientError
from plumbline_trainer.progress import ProgressReporter
from plumbline_trainer.storage.checkpoints import load_latest_checkpoint, save_checkpoint, wait_for_uploads
from support.trainer import stage_context


def save(context: StageContext, step: int, content: str = "") -> None:
    folder = context.scratch / f"save-{step}"
    folder.mkdir()
    (folder / "weights.safetensors").write_text(content or f"weights {step}")
    save_checkpoint(context, step, folder, {"step": step, "random": [1, 2]})


def restarted(context: StageContext, number: int = 2) -> StageContext:
    scratch = context.scratch.with_name(f"attempt-{number}")
    scratch.mkdir()
    return replace(context, scratch=scratch, uploads=None)


def stored(context: StageContext) -> list[Path]:
    root = Path(context.run_root.removeprefix("file://")) / "checkpoints"
    return sorted(root.iterdir()) if root.exists() else []


def test_nothing_saved_is_a_fresh_start(tmp_path: Path) -> None:
    assert load_latest_checkpoint(stage_context(tmp_path)) is None


def test_the_newest_is_resumed_and_two_are_kept(tmp_path: Path) -> None:
    context = stage_context(tmp_path)
    for step in (10, 20, 30, 40):
        save(context, step)
    wait_for_uploads(context)
    assert [path.name[:8] for path in stored(context)] == ["00000030", "00000040"]
    assert not (context.scratch / "save-40").exists()
    found = load_latest_checkpoint(restarted(context))
    assert found is not None
    assert (found.step, found.state["random"]) == (40, [1, 2])
    assert (found.folder / "weights.safetensors").read_text() == "weights 40"


@pytest.mark.parametrize("harm", ["flip", "truncate", "unlink", "manifest", "no manifest"])
def test_a_damaged_one_is_skipped_for_the_one_before(tmp_path: Path, harm: str) -> None:
    context = stage_context(tmp_path)
    save(context, 10)
    save(context, 20)
    wait_for_uploads(context)
    newest = stored(context)[-1]
    weights, manifest = newest / "weights.safetensors", newest / "manifest.json"
    if harm == "flip":
        weights.write_text("weighTs 20")
    elif harm == "truncate":
        weights.write_text("weights")
    elif harm == "unlink":
        weights.unlink()
    elif harm == "manifest":
        manifest.write_text(manifest.read_text()[:-20])
    else:
        manifest.unlink()
    found = load_latest_checkpoint(restarted(context))
    assert found is not None
    assert (found.step, (found.folder / "weights.safetensors").read_text()) == (10, "weights 10")


def test_ranks_of_a_node_take_the_same_one(tmp_path: Path) -> None:
    context = stage_context(tmp_path)
    save(context, 10)
    wait_for_uploads(context)
    first = restarted(context)
    one = load_latest_checkpoint(first)
    save(context, 20)
    wait_for_uploads(context)
    assert load_latest_checkpoint(replace(first, rank=1)) == one


def test_what_a_killed_upload_left_is_cleared_away(tmp_path: Path) -> None:
    context = stage_context(tmp_path)
    orphan = Path(context.run_root.removeprefix("file://")) / "checkpoints" / "00000005-aaaa" / "half"
    orphan.parent.mkdir(parents=True)
    orphan.write_text("half")
    save(context, 10)
    wait_for_uploads(context)
    assert [path.name[:8] for path in stored(context)] == ["00000010"]


def test_checkpoints_of_other_work_are_not_taken(tmp_path: Path) -> None:
    context = stage_context(tmp_path)
    save(context, 10)
    wait_for_uploads(context)
    manifest = stored(context)[0] / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"fingerprint": "0" * 64}))
    assert load_latest_checkpoint(restarted(context)) is None


def test_a_failed_upload_comes_up_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = stage_context(tmp_path)

    def fail(*_: Any) -> None:
        raise TransientError("the network is gone")

    monkeypatch.setattr(context.store, "put_folder", fail)
    save(context, 10)
    with pytest.raises(TransientError, match="the network is gone"):
        save(context, 20)


def test_a_state_that_is_no_json_fails_at_once(tmp_path: Path) -> None:
    context = stage_context(tmp_path)
    with pytest.raises(TypeError):
        save_checkpoint(context, 1, context.scratch, {"x": object()})


def test_figures_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    context = stage_context(tmp_path)
    for step in (1, 2, 3):
        context.progress.update(step, 10, metrics={"loss": 1.0 / step})
    context.progress.close()
    save(context, 2)
    wait_for_uploads(context)
    again = restarted(context)
    again.progress = ProgressReporter(store=again.store, run_root=again.run_root, scratch=again.scratch, environment={})
    load_latest_checkpoint(again)
    again.progress.update(3, 10, metrics={"loss": 0.5})
    again.progress.close()
    kept = [json.loads(line) for line in again.store.get_bytes(f"{again.run_root}/metrics.jsonl").decode().splitlines()]
    assert [(line["step"], line["metrics"]["loss"]) for line in kept] == [(1, 1.0), (2, 0.5), (3, 0.5)]
