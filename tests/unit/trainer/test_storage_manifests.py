"""Outputs: one commit, verified before use, damage named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.errors import InputError
from plumbline_trainer.storage import manifests
from plumbline_trainer.storage.manifests import commit_output, damage, fetch_output, read_manifest
from support.trainer import base_model, output_of, stage_context, stage_run


def output(folder: Path, text: str = "weights", **metrics: float) -> StageOutput:
    made = folder / f"made-{text}"
    (made / "sub").mkdir(parents=True, exist_ok=True)
    (made / "model.safetensors").write_text(text)
    (made / "sub" / "config.json").write_text("{}")
    return StageOutput(made, "policy", meta={"form": "full"}, metrics=metrics or {"loss": 1.0})


def committed_files(context: StageContext) -> Path:
    found = read_manifest(context.store, context.output_root)
    assert found is not None
    return Path(context.output_root.removeprefix("file://")) / found[0].folder


def on_another_node(context: StageContext, name: str = "node-2") -> StageContext:
    scratch = context.scratch.with_name(name)
    scratch.mkdir(exist_ok=True)
    return replace(context, scratch=scratch, manifest_digests={})


def test_a_commit_is_found_verified_and_downloaded_once(tmp_path: Path) -> None:
    context = stage_context(tmp_path)
    manifest, digest = commit_output(context, output(tmp_path))
    assert [file.path for file in manifest.files] == ["model.safetensors", "sub/config.json"]
    fetched = fetch_output(context, context.output_root)
    assert (fetched.digest, fetched.manifest) == (digest, manifest)
    assert (fetched.folder / "model.safetensors").read_text() == "weights"
    shutil.rmtree(committed_files(context))
    again = fetch_output(context, context.output_root)
    assert (again.folder, again.digest) == (fetched.folder, digest)


def test_parents_are_the_manifests_that_were_read(tmp_path: Path) -> None:
    first = stage_context(tmp_path, stage_run(tmp_path, "sft", inputs=[base_model("file:///base")]))
    _, digest = commit_output(first, output(tmp_path))
    second = stage_context(tmp_path, stage_run(tmp_path, "dpo", inputs=[output_of(first.run)]))
    fetch_output(second, second.root_of(second.input("model")))
    manifest, _ = commit_output(second, output(tmp_path, "more"))
    parent = manifest.parent("model")
    assert parent is not None
    assert (parent.manifest_digest, parent.type, parent.fingerprint) == (digest, "sft", first.run.fingerprint)
    external = read_manifest(first.store, first.output_root)
    assert external is not None
    assert external[0].parents[0].uri == "file:///base"


def test_the_second_of_two_writers_takes_the_first_ones_result(tmp_path: Path) -> None:
    context = stage_context(tmp_path)
    first, digest = commit_output(context, output(tmp_path, "one"))
    second, other = commit_output(context, output(tmp_path, "two"))
    assert (second, other) == (first, digest)
    root = Path(context.output_root.removeprefix("file://"))
    assert [path.name for path in root.glob("out-*")] == [first.folder]


def test_a_damaged_winner_is_replaced(tmp_path: Path) -> None:
    context = stage_context(tmp_path)
    first, _ = commit_output(context, output(tmp_path, "one"))
    (committed_files(context) / "model.safetensors").write_text("onE")
    second, digest = commit_output(context, output(tmp_path, "two"))
    assert second.folder != first.folder
    found = read_manifest(context.store, context.output_root)
    assert found == (second, digest)


def test_a_winner_of_other_inputs_is_replaced(tmp_path: Path) -> None:
    parent = stage_context(tmp_path, stage_run(tmp_path, "sft"))
    commit_output(parent, output(tmp_path))
    child = stage_run(tmp_path, "dpo", inputs=[output_of(parent.run)])
    commit_output(stage_context(tmp_path, child), output(tmp_path, "old"))
    (committed_files(parent) / "model.safetensors").unlink()
    commit_output(stage_context(tmp_path, parent.run), output(tmp_path))
    manifest, _ = commit_output(stage_context(tmp_path, child), output(tmp_path, "new"))
    current = read_manifest(parent.store, parent.output_root)
    assert current is not None
    assert manifest.parents[0].manifest_digest == current[1]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda file: file.write_text("weighty"), "model.safetensors is damaged: it does not match its SHA-256"),
        (lambda file: file.write_text("weigh"), "model.safetensors is damaged: it has 5 bytes instead of 7"),
        (lambda file: file.unlink(), "model.safetensors is missing"),
    ],
)
def test_damage_is_named_before_anything_is_read(tmp_path: Path, harm: object, said: str) -> None:
    context = stage_context(tmp_path)
    manifest, _ = commit_output(context, output(tmp_path))
    assert damage(context.store, context.output_root, manifest) is None
    harm(committed_files(context) / "model.safetensors")  # type: ignore[operator]
    other = on_another_node(context)
    with pytest.raises(InputError, match=said) as caught:
        fetch_output(other, context.output_root)
    assert caught.value.reason == "InputMissing"
    assert not (other.scratch / "outputs").exists() or not list((other.scratch / "outputs").glob("*/model*"))
    assert damage(context.store, context.output_root, manifest) is not None


def test_a_missing_or_broken_manifest_is_a_missing_input(tmp_path: Path) -> None:
    context = stage_context(tmp_path)
    with pytest.raises(InputError, match="is missing: the output of an earlier stage") as caught:
        fetch_output(context, context.output_root)
    assert caught.value.reason == "InputMissing"
    context.store.put_bytes(manifests.manifest_uri(context.output_root), b'{"version": 1')
    with pytest.raises(InputError, match="is damaged") as caught:
        read_manifest(context.store, context.output_root)
    assert caught.value.reason == "InputMissing"


@pytest.mark.parametrize("path", ["../../x", "/etc/passwd", "a/../../b", "%2e%2e/x"])
def test_a_manifest_cannot_reach_outside_its_folder(tmp_path: Path, path: str) -> None:
    context = stage_context(tmp_path)
    commit_output(context, output(tmp_path))
    uri = manifests.manifest_uri(context.output_root)
    document = json.loads(context.store.get_bytes(uri))
    document["files"][0]["path"] = path
    context.store.put_bytes(uri, json.dumps(document).encode())
    with pytest.raises(InputError):
        fetch_output(on_another_node(context), context.output_root)
    document["files"][0]["path"], document["folder"] = "x", path
    context.store.put_bytes(uri, json.dumps(document).encode())
    with pytest.raises(InputError):
        read_manifest(context.store, context.output_root)


def test_metrics_keep_their_order_and_lose_what_json_cannot_hold(tmp_path: Path) -> None:
    context = stage_context(tmp_path)
    commit_output(context, output(tmp_path, z=1.0, a=float("nan"), m=2.0))
    found = read_manifest(context.store, context.output_root)
    assert found is not None
    assert list(found[0].metrics.items()) == [("z", 1.0), ("m", 2.0)]
