"""What a local run knows of reward endpoints and functions."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from plumbline_api.online import Reward
from plumbline_cli.local.launch import trainer_environment
from plumbline_cli.local.session import open_session
from plumbline_cli.manifests import InvalidManifestError, read_documents, validate_documents
from support.pipelines import runtime_body
from support.trainer import stage_run

PIPELINE: dict[str, Any] = {
    "apiVersion": "plumbline.dev/v1alpha1",
    "kind": "AlignmentPipeline",
    "metadata": {"name": "p"},
    "spec": {
        "model": {"source": "bundled://smollm2-135m-instruct"},
        "datasets": [{"name": "asked", "source": "asked.jsonl", "format": "prompt"}],
        "stages": [
            {
                "name": "rl",
                "grpo": {
                    "prompts": "asked",
                    "rewards": [{"endpoint": "judge"}, {"model": "file://rm"}, {"function": "kind:score"}],
                },
            }
        ],
    },
}


def runtime(name: str = "cpu", url: str = "http://127.0.0.1:8000/", **metadata: Any) -> dict[str, Any]:
    body = runtime_body(rewardEndpoints=[{"name": "judge", "url": url}])
    return {**body, "metadata": {"name": name, **metadata}}


def write(folder: Path, *documents: dict[str, Any], reference: str | None = None) -> str:
    pipeline = {**PIPELINE, "spec": {**PIPELINE["spec"], **({"runtimeRef": {"name": reference}} if reference else {})}}
    (folder / "p.yaml").write_text(yaml.safe_dump_all([pipeline, *documents], sort_keys=False))
    return str(folder / "p.yaml")


def urls(folder: Path, file: str) -> list[str]:
    settings = open_session(file, storage=folder / "runs").settings
    return [endpoint.url for endpoint in settings.local_endpoints]


def test_endpoints_come_from_the_runtime_in_the_file(tmp_path: Path) -> None:
    assert urls(tmp_path, write(tmp_path, runtime())) == ["http://127.0.0.1:8000/"]
    others = [runtime("a", "http://a/"), runtime("b", "http://b/")]
    assert urls(tmp_path, write(tmp_path, *others, reference="b")) == ["http://b/"]
    default = runtime("c", "http://c/", annotations={"plumbline.dev/is-default-runtime": "true"})
    assert urls(tmp_path, write(tmp_path, *others, default)) == ["http://c/"]


@pytest.mark.parametrize("reference", [None, "elsewhere"])
def test_without_one_the_field_is_named_with_what_to_do(tmp_path: Path, reference: str | None) -> None:
    documents = [] if reference is None else [runtime()]
    file = write(tmp_path, *documents, reference=reference)
    with pytest.raises(InvalidManifestError) as told:
        open_session(file, storage=tmp_path / "runs")
    (line,) = str(told.value).splitlines()
    assert 'spec.stages[0].grpo.rewards[0].endpoint: nothing says where "judge" is' in line
    assert line.startswith(f"{file}:")
    findings, _ = validate_documents(read_documents(file), place="local")
    assert [str(finding) for finding in findings] == [line]


def test_paths_of_classifiers_are_relative_to_the_manifest(tmp_path: Path) -> None:
    session = open_session(write(tmp_path, runtime()), storage=tmp_path / "runs")
    rewards: list[Reward] = session.pipeline.spec.stages[0].grpo.rewards  # type: ignore[union-attr]
    assert rewards[1].model == f"file://{tmp_path}/rm"


def test_a_trainer_gets_tokens_of_endpoints_folders_of_functions_and_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files: Any = SimpleNamespace(termination=tmp_path / "t", progress=tmp_path / "p")
    given = {
        "PLUMBLINE_ENDPOINT_TOKEN_JUDGE": "s3cret",
        "OTHER_TOKEN": "mine",
        "PYTHONPATH": os.pathsep.join([".", "/opt/lib"]),
    }
    found = trainer_environment(given, stage_run(tmp_path), files, parallel=3)
    assert found["PLUMBLINE_STAGES_AT_ONCE"] == "3"
    assert found["PLUMBLINE_ENDPOINT_TOKEN_JUDGE"] == "s3cret"
    assert "OTHER_TOKEN" not in found
    assert found["PYTHONPATH"] == os.pathsep.join([str(tmp_path), "/opt/lib"])
