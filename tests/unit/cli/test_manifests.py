import textwrap
from itertools import pairwise
from pathlib import Path

import pytest
from plumbline_cli.exits import CommandError
from plumbline_cli.manifests import InvalidManifestError, read_documents, read_pipeline_document, validate_documents

GOOD = """\
apiVersion: plumbline.dev/v1alpha1
kind: AlignmentPipeline
metadata:
  name: p
spec:
  model: {source: bundled://smollm2-135m-instruct}
  datasets:
    - name: tickets
      source: data/tickets.jsonl
      format: instruction
    - name: prefs
      source: data/prefs.jsonl
      format: preference
  stages:
    - name: sft
      sft:
        dataset: tickets
        training: {learningRate: 2e-4}
    - name: dpo
      dpo:
        dataset: prefs
"""


def write(folder: Path, text: str, name: str = "p.yaml") -> str:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


def complaints(folder: Path, text: str, *, place: str = "anywhere") -> list[str]:
    file = write(folder, text)
    try:
        findings, _ = validate_documents(read_documents(file), place=place)
    except InvalidManifestError as error:
        findings = error.findings
    return [str(finding).replace(file, "p.yaml") for finding in findings]


def test_a_good_manifest_has_no_findings(tmp_path):
    assert complaints(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "learningRate: 2e-4",
            "learningRte: 2e-4",
            "p.yaml:18: spec.stages[0].sft.training.learningRte: unknown field. Did you mean learningRate?",
        ),
        ("dataset: prefs", "dataset: pref", 'p.yaml:21: spec.stages[1].dpo.dataset: there is no dataset "pref".'),
        (
            "dataset: prefs",
            "dataset: tickets",
            'p.yaml:21: spec.stages[1].dpo.dataset: "tickets" holds instruction rows',
        ),
        ("name: dpo", "name: sft", 'p.yaml:19: spec.stages[1].name: "sft" is taken by spec.stages[0]'),
        ("kind: AlignmentPipeline", "kind: AlignmentPipelin", 'p.yaml:2: kind: "AlignmentPipelin" is not one of'),
        ("  name: p\n", "  name: p\n  name: q\n", "p.yaml:5: metadata.name: stands twice, first on line 4"),
        ("  model: {", "  model: [{", "p.yaml:7: not YAML: while parsing a flow sequence (begun on line 6) "),
        ("metadata:\n", "metadata:\n\tlabels: {}\n", "p.yaml:4: not YAML: "),
        ("  model: {source: bundled://smollm2-135m-instruct}\n", "", "p.yaml:5: spec.model: required, but not set"),
        ("name: p\n", f"name: {'p' * 64}\n", 'p.yaml:4: metadata.name: "ppp'),
    ],
)
def test_a_mistake_is_named_with_file_line_and_field(tmp_path, old, new, expected):
    assert old in GOOD
    found = complaints(tmp_path, GOOD.replace(old, new, 1))
    assert any(line.startswith(expected) for line in found), found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "p.yaml: the file is empty; `plumbline init FOLDER` writes a manifest to start from"),
        (
            "# only a remark\n---\n",
            "p.yaml: the file is empty; `plumbline init FOLDER` writes a manifest to start from",
        ),
        ("a: " + "[" * 3000 + "]" * 3000, "p.yaml: nested too deeply for a manifest"),
        ("a: b\0c\n", "p.yaml: not YAML: unacceptable character #x0000: special characters are not allowed in"),
        ("- a\n", "p.yaml:1: a manifest is a mapping (apiVersion, kind, metadata, spec), this is a list"),
        ("42\n", 'p.yaml:1: a manifest is a mapping (apiVersion, kind, metadata, spec), this is "42"'),
        (GOOD.split("\n", 1)[1], "p.yaml:1: apiVersion: required, but not set; write plumbline.dev/v1alpha1"),
        (GOOD.replace("  name: p\n", "  name: p\n  lables: {}\n", 1), "p.yaml:5: metadata.lables: unknown field. "),
        (GOOD + "---\n" + GOOD, 'p.yaml:26: metadata.name: "p" stands twice, first in p.yaml:4; choose another name'),
    ],
)
def test_a_file_that_is_no_manifest_is_told_so(tmp_path, text, expected):
    assert any(line.startswith(expected) for line in complaints(tmp_path, text)), complaints(tmp_path, text)


def test_an_object_of_two_namespaces_stands_once_in_each(tmp_path):
    other = GOOD.replace("  name: p\n", "  name: p\n  namespace: other\n", 1)
    assert complaints(tmp_path, GOOD + "---\n" + other) == []


def test_a_dataset_in_place_of_a_manifest_is_not_read(tmp_path):
    with (tmp_path / "rows.jsonl").open("wb") as file:
        file.truncate(4 * 2**20)
    with pytest.raises(CommandError, match="this file has 4 MiB; is it a dataset"):
        read_documents(str(tmp_path / "rows.jsonl"))


def test_aliases_are_looked_at_once(tmp_path):
    levels = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghijk"))
    [document] = read_documents(write(tmp_path, f"a: &a [x]\n{levels}"))
    assert len(document.body["k"]) == 9


def test_a_runtime_is_no_pipeline(tmp_path):
    runtime = "apiVersion: plumbline.dev/v1alpha1\nkind: AlignmentRuntime\nmetadata: {name: r}\nspec: {image: i}\n"
    with pytest.raises(CommandError, match="holds no AlignmentPipeline, but AlignmentRuntime"):
        read_pipeline_document(write(tmp_path, runtime))


def test_local_files_are_refused_for_a_cluster(tmp_path):
    found = complaints(tmp_path, GOOD, place="cluster")
    assert [line.split(": ")[:2] for line in found[:2]] == [
        ["p.yaml:9", "spec.datasets[0].source"],
        ["p.yaml:12", "spec.datasets[1].source"],
    ]


def test_scalars_read_as_the_api_server_reads_them(tmp_path):
    file = write(tmp_path, "a: 1e-4\nb: 2024-01-01\nc: 5e3\nd: 1.5\n")
    [document] = read_documents(file)
    assert document.body == {"a": 1e-4, "b": "2024-01-01", "c": 5000.0, "d": 1.5}


def test_several_documents_are_checked_together_and_foreign_kinds_are_left_alone(tmp_path):
    runtime = """\
    apiVersion: plumbline.dev/v1alpha1
    kind: AlignmentRuntime
    metadata: {name: small}
    spec:
      image: example.org/trainer@sha256:abc
      storage: {uri: s3://bucket/root}
      allow: {modelSources: ["hf://org/"]}
    """
    secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\n"
    pipeline = GOOD.replace("spec:\n", "spec:\n  runtimeRef: {name: small}\n", 1)
    file = write(tmp_path, textwrap.dedent(runtime) + "---\n" + secret + "---\n" + pipeline)
    findings, remarks = validate_documents(read_documents(file), place="anywhere")
    assert [finding.problem.path for finding in findings] == ["spec.model.source"]
    assert "runtime small does not allow the model source" in findings[0].problem.message
    assert remarks == [f"{file}: Secret of another API is not checked"]


def test_a_mistake_in_a_runtime_is_named(tmp_path):
    text = """\
    apiVersion: plumbline.dev/v1alpha1
    kind: AlignmentRuntime
    metadata: {name: small}
    spec:
      imag: example.org/trainer
    """
    assert "p.yaml:5: spec.imag: unknown field. Did you mean image?" in complaints(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(CommandError, match="there is no such file") as caught:
        read_documents(str(tmp_path / "none.yaml"))
    assert caught.value.code == 3
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CommandError, match="not UTF-8") as caught:
        read_documents(str(tmp_path / "binary.yaml"))
    assert caught.value.code == 2
    with pytest.raises(CommandError, match="folder"):
        read_documents(str(tmp_path))


def test_a_pipeline_is_chosen_by_name_where_a_file_holds_several(tmp_path):
    file = write(tmp_path, GOOD + "---\n" + GOOD.replace("name: p\n", "name: q\n", 1))
    with pytest.raises(CommandError, match=r"2 pipelines \(p, q\); choose one"):
        read_pipeline_document(file)
    assert read_pipeline_document(file, "q").line_of("metadata.name") == 26
    with pytest.raises(CommandError, match="no AlignmentPipeline named r"):
        read_pipeline_document(file, "r")
