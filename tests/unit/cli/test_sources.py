from pathlib import Path

from plumbline_cli.local.sources import choose_storage, localise
from support.local_runs import pipeline_body

FOLDER = Path("/work/project")


def test_paths_are_relative_to_the_manifest_and_other_sources_stay():
    body = pipeline_body()
    sources = ["data/a.jsonl", "../b/*.jsonl", "/abs/c.csv", "file://d.txt", "s3://bucket/e.jsonl", "hf://datasets/o/n"]
    body["spec"]["datasets"] = [{"name": f"d{i}", "source": source} for i, source in enumerate(sources)]
    local, notes = localise(body, FOLDER, gpus=0)
    assert [dataset["source"] for dataset in local["spec"]["datasets"]] == [
        "file:///work/project/data/a.jsonl",
        "file:///work/b/*.jsonl",
        "file:///abs/c.csv",
        "file:///work/project/d.txt",
        "s3://bucket/e.jsonl",
        "hf://datasets/o/n",
    ]
    assert notes == []
    assert body["spec"]["datasets"][0]["source"] == "data/a.jsonl", "the given body is not changed"


def test_a_tilde_is_the_home_of_the_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    body = pipeline_body()
    body["spec"]["model"]["source"] = "file://~/models/tiny"
    sources = ["~/rows/*.jsonl", "file://~/folder/", "odd~/a.jsonl"]
    body["spec"]["datasets"] = [{"name": f"d{i}", "source": source} for i, source in enumerate(sources)]
    spec = localise(body, FOLDER, gpus=0)[0]["spec"]
    assert spec["model"]["source"] == "file:///home/ada/models/tiny"
    assert [dataset["source"] for dataset in spec["datasets"]] == [
        "file:///home/ada/rows/*.jsonl",
        "file:///home/ada/folder/",
        "file:///work/project/odd~/a.jsonl",
    ]


def test_models_and_judges_are_found_beside_the_manifest_too():
    body = pipeline_body()
    body["spec"]["model"]["source"] = "file://models/tiny"
    judge = {"model": {"source": "file://models/judge"}}
    suites = [{"winRate": {"dataset": "questions", "judge": judge}}]
    body["spec"]["stages"].append({"name": "exam", "evaluate": {"suites": suites}})
    spec = localise(body, FOLDER, gpus=0)[0]["spec"]
    assert spec["model"]["source"] == "file:///work/project/models/tiny"
    found = spec["stages"][-1]["evaluate"]["suites"][0]["winRate"]["judge"]["model"]["source"]
    assert found == "file:///work/project/models/judge"


def test_what_only_a_cluster_has_is_left_out_with_a_word():
    body = pipeline_body(resources={"nodes": 2, "gpusPerNode": 8, "memory": "64Gi"})
    body["spec"]["runtimeRef"] = {"name": "h100"}
    local, notes = localise(body, FOLDER, gpus=0)
    assert "runtimeRef" not in local["spec"]
    assert local["spec"]["stages"][0]["resources"] == {"nodes": 1, "memory": "64Gi"}
    assert notes == [
        "spec.runtimeRef (h100) is for clusters; stages run as processes of this machine",
        "sft asks for 2 nodes; this machine is one",
        "sft asks for 8 GPUs; this machine has none",
    ]
    assert localise(body, FOLDER, gpus=2)[0]["spec"]["stages"][0]["resources"]["gpusPerNode"] == 2


def test_a_body_of_the_wrong_shape_is_left_to_the_schema_check():
    for spec in (None, [], {"datasets": "x", "stages": [3], "model": 4}, {"stages": [{"evaluate": []}]}):
        assert localise({"spec": spec}, FOLDER, gpus=0)[0] == {"spec": spec}


def test_storage_is_the_given_folder_or_the_manifests_or_the_default():
    default = Path("/work/runs")
    plain, s3, file = (
        {"spec": {}},
        {"spec": {"storage": {"uri": "s3://b/p"}}},
        {"spec": {"storage": {"uri": "file://out"}}},
    )
    assert choose_storage(plain, FOLDER, None, default) == (default, [])
    assert choose_storage(plain, FOLDER, Path("/x"), default) == (Path("/x"), [])
    assert choose_storage(file, FOLDER, None, default) == (Path("/work/project/out"), [])
    chosen, notes = choose_storage(s3, FOLDER, None, default)
    assert chosen == default
    assert notes == ["spec.storage (s3://b/p) is not used by a local run; results go to /work/runs"]
    assert choose_storage(file, FOLDER, Path("/x"), default)[1], "a storage that is passed over is mentioned"
