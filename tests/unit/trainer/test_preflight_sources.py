"""Datasets and models that are not there or not what they should be, as preflight names them."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from plumbline_trainer.storage.objects import ObjectStore
from safetensors.torch import load_file, save_file
from support import tiny
from support.preflighting import pipeline, plan_of, preflight


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "base")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("file:///nowhere/q.jsonl", "is not there"),
        ("file:///nowhere/*.jsonl", "no file matches"),
        ("s3://nowhere/q.jsonl", "nowhere"),
    ],
)
def test_a_missing_dataset_is_named(
    tmp_path: Path, model: Path, source: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    result, code = preflight(pipeline(tmp_path, model, source=source))
    assert (code, said in result.message) == (2, True), result


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "pytorch_model.bin").write_bytes(b"\x80\x04")
    result, code = preflight(pipeline(tmp_path, empty))
    assert code == 2
    assert "config.json and *.safetensors" in result.message
    assert "never loaded: convert them to safetensors" in result.message


def damaged(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


def test_files_of_two_models_are_told_apart(tmp_path: Path, model: Path) -> None:
    folder = damaged(model, tmp_path / "mixed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    result, code = preflight(pipeline(tmp_path, folder))
    assert code == 2
    assert "model.embed_tokens.weight has 24,576 numbers, config.json asks for 384 × 128" in result.message


def test_a_model_without_its_tokenizer_is_named(tmp_path: Path, model: Path) -> None:
    folder = damaged(model, tmp_path / "mute")
    (folder / "tokenizer.json").unlink()
    result, code = preflight(pipeline(tmp_path, folder))
    assert (code, result.message) == (2, "mute: it has no tokenizer. A tokenizer.json must lie beside the weights")


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    result, code = preflight(pipeline(tmp_path, tmp_path / "nowhere"))
    assert code == 2
    assert result.message.startswith(f'there is no model at "file://{tmp_path}/nowhere": no folder of that name')


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class TestWeights:
    """Weights that do not fit their configuration are refused from the heads of the files, in a bucket as in a folder."""

    @pytest.fixture(params=["file", "s3"])
    def place(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
        """Put a model folder there; its URI."""
        if request.param == "file":
            return lambda folder: f"file://{folder}"
        endpoint = request.getfixturevalue("s3_endpoint")
        for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        client = boto3.client("s3", region_name="us-east-1")
        bucket = f"models-{secrets.token_hex(8)}"
        client.create_bucket(Bucket=bucket)

        def put(folder: Path) -> str:
            for path in folder.iterdir():
                client.upload_file(str(path), bucket, f"base/{path.name}")
            return f"s3://{bucket}/base"

        return put

    def refused(self, folder: Path, uri: str) -> str:
        result, code = preflight(pipeline(folder, uri))
        assert (code, result.reason) == (2, "BadInput"), result
        return result.message

    def test_another_shape(self, tmp_path: Path, model: Path, place: Callable[[Path], str]) -> None:
        folder = damaged(model, tmp_path / "m")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
        uri = place(folder)
        assert self.refused(tmp_path, uri) == (
            f"{uri}: 6 weights have another shape than its config.json says (model.layers.0.mlp.down_proj.weight: "
            "[64, 128], not [64, 256]). The files do not belong together; copy the model again"
        )

    def test_a_missing_weight(self, tmp_path: Path, model: Path, place: Callable[[Path], str]) -> None:
        folder = damaged(model, tmp_path / "m")
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, folder / "model.safetensors")
        uri = place(folder)
        assert self.refused(tmp_path, uri).startswith(
            f"{uri}: 1 weights that its config.json asks for are not there (model.layers.1.mlp.up_proj.weight)"
        )

    def test_quantised_weights(self, tmp_path: Path, model: Path, place: Callable[[Path], str]) -> None:
        folder = damaged(model, tmp_path / "m")
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
        save_file(weights, folder / "model.safetensors")
        uri = place(folder)
        assert self.refused(tmp_path, uri).startswith(f"{uri}: model.layers.1.mlp.up_proj.weight is stored as I8; ")

    def test_a_file_cut_short(self, tmp_path: Path, model: Path, place: Callable[[Path], str]) -> None:
        folder = damaged(model, tmp_path / "m")
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[:-1000])
        assert self.refused(tmp_path, place(folder)) == (
            f"model.safetensors has {len(whole) - 1000:,} bytes, its header says {len(whole):,}. Copy it again"
        )

    def test_a_file_that_the_index_names_is_not_there(
        self, tmp_path: Path, model: Path, place: Callable[[Path], str]
    ) -> None:
        folder = damaged(model, tmp_path / "m")
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        save_file(weights, folder / names[0])
        index = {"weight_map": {name: names[number % 2] for number, name in enumerate(sorted(weights))}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert f"{names[1]} is missing, although model.safetensors.index.json names it" in self.refused(
            tmp_path, place(folder)
        )

    def test_sound_weights_are_counted_without_being_fetched(
        self, tmp_path: Path, place: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In shards, in bfloat16 that config.json does not speak of, with a tied head."""
        folder = tiny.save_model(tmp_path / "m", dtype="bfloat16")
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        where = {
            name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(sorted(weights))
        }
        for shard in set(where.values()):
            save_file({name: weights[name] for name in weights if where[name] == shard}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        config = json.loads((folder / "config.json").read_text())
        config.pop("dtype", None)
        (folder / "config.json").write_text(json.dumps(config))
        fetched: list[str] = []
        get_file = ObjectStore.get_file
        monkeypatch.setattr(
            ObjectStore, "get_file", lambda self, uri, path: (fetched.append(uri), get_file(self, uri, path))[1]
        )
        made = pipeline(tmp_path, place(folder))
        result, code = preflight(made)
        assert code == 0, result
        facts = plan_of(made)["models"]["model"]
        assert facts["parameters"] == sum(weight.numel() for weight in weights.values())
        assert facts["storageDtype"] == "bfloat16"
        assert not [uri for uri in fetched if uri.endswith(".safetensors")]
