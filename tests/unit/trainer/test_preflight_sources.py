"""Datasets and models that are not there or not what they should be, as preflight names them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import tiny
from support.preflighting import pipeline, preflight


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
