"""The trainer's storage over a real S3 server: transfers, the commit race, damage below S3, denials."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from cluster.objectstore import ObjectStore
from plumbline_api.pipeline import Storage
from plumbline_trainer.context import StageContext, StageOutput
from plumbline_trainer.errors import InputError
from plumbline_trainer.storage import manifests
from plumbline_trainer.storage.checkpoints import load_latest_checkpoint, save_checkpoint, wait_for_uploads
from plumbline_trainer.storage.objects import open_store
from support.trainer import stage_context, stage_run

pytestmark = pytest.mark.component
MEBIBYTE = 1024 * 1024


@pytest.fixture
def context(tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> StageContext:
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    folder = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]
    storage = Storage(
        uri=f"s3://{object_store.bucket}/{folder}", endpoint=object_store.endpoint, region=object_store.region
    )
    return stage_context(tmp_path, stage_run(tmp_path, storage=storage))


def made(folder: Path, size: int = 70 * MEBIBYTE) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(size))
    (folder / "config.json").write_text("{}")
    return folder


def test_a_large_output_is_committed_and_fetched(context: StageContext, tmp_path: Path) -> None:
    folder = made(tmp_path / "made")
    manifest, digest = manifests.commit_output(context, StageOutput(folder, "policy"))
    fetched = manifests.fetch_output(context, context.output_root)
    assert fetched.digest == digest
    assert (fetched.folder / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert manifests.damage(context.store, context.output_root, manifest) is None


def test_one_of_many_committing_at_once_wins(context: StageContext, tmp_path: Path) -> None:
    def commit(number: int) -> str:
        folder = made(tmp_path / f"made-{number}", 1000 + number)
        return manifests.commit_output(replace(context, scratch=tmp_path), StageOutput(folder, "policy"))[1]

    with ThreadPoolExecutor(6) as pool:
        digests = set(pool.map(commit, range(6)))
    found = manifests.read_manifest(context.store, context.output_root)
    assert found is not None
    assert digests == {found[1]}
    folders = {
        info.uri.removeprefix(context.output_root).split("/")[1] for info in context.store.list(context.output_root)
    }
    assert folders == {"manifest.json", found[0].folder}


def test_a_byte_flipped_below_the_server_is_seen(
    context: StageContext, tmp_path: Path, object_store: ObjectStore
) -> None:
    manifest, _ = manifests.commit_output(context, StageOutput(made(tmp_path / "made", MEBIBYTE), "policy"))
    uri = f"{context.output_root}/{manifest.folder}/model.safetensors"
    before = context.store.stat(uri)
    key = uri.removeprefix(f"s3://{object_store.bucket}/")
    path = Path(object_store.folder) / object_store.bucket / key
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    after = context.store.stat(uri)
    assert before is not None
    assert after is not None
    assert (before.size, before.etag) == (after.size, after.etag), "the server's own word does not show it"
    assert manifests.damage(context.store, context.output_root, manifest) == "model.safetensors is damaged"
    with pytest.raises(InputError, match=r"model\.safetensors is damaged") as caught:
        manifests.fetch_output(context, context.output_root)
    assert caught.value.reason == "InputMissing"


def test_checkpoints_go_there_and_back(context: StageContext, tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save_checkpoint(context, step, made(tmp_path / f"save-{step}", 1000), {"step": step})
    wait_for_uploads(context)
    scratch = tmp_path / "next"
    scratch.mkdir()
    found = load_latest_checkpoint(replace(context, scratch=scratch, uploads=None))
    assert found is not None
    assert (found.step, found.state) == (15, {"step": 15})
    assert len({info.uri.split("/")[-2] for info in context.store.list(f"{context.run_root}/checkpoints")}) == 2


@pytest.mark.parametrize("wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_named(context: StageContext, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    monkeypatch.setenv(wrong, "0" * 40)
    for attempt in (
        lambda store: store.put_bytes(f"{context.run_root}/x", b""),
        lambda store: store.exists(f"{context.run_root}/x"),
        lambda store: store.list(context.run_root),
    ):
        with pytest.raises(InputError, match=r"AWS_ACCESS_KEY_ID.*storage\.secretName") as caught:
            attempt(open_store(context.run.storage))
        assert caught.value.reason == "StorageDenied"


def test_a_missing_bucket_is_named(context: StageContext) -> None:
    with pytest.raises(InputError, match="no bucket nowhere") as caught:
        context.store.put_bytes("s3://nowhere/x", b"")
    assert caught.value.reason == "StorageMissing"
