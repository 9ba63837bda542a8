import json
import re
from pathlib import Path

import pytest
from plumbline_cli.manifests import read_documents, validate_documents

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"
QUICKSTART = EXAMPLES / "01-quickstart" / "data"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/*.yaml")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_manifest_is_valid(file):
    documents = read_documents(str(file))
    findings, remarks = validate_documents(documents, place="anywhere")
    assert [str(finding) for finding in findings] == []
    assert remarks == []


def test_support_assistant_fits_the_runtime_beside_it_and_a_cluster():
    folder = EXAMPLES / "02-support-assistant"
    documents = [*read_documents(str(folder / "pipeline.yaml")), *read_documents(str(folder / "runtime.yaml"))]
    findings, _ = validate_documents(documents, place="cluster")
    assert [str(finding) for finding in findings] == []


@pytest.mark.parametrize(
    "name",
    [
        "01-quickstart",
        "03-tiny",
        "04-preference-methods",
        "05-thumbs",
        "06-reward-model",
        "07-merging",
        "08-against-forgetting",
    ],
)
def test_data_named_by_a_manifest_are_there(name):
    folder = EXAMPLES / name
    [document] = read_documents(str(folder / "pipeline.yaml"))
    for dataset in document.body["spec"]["datasets"]:
        assert (folder / dataset["source"]).stat().st_size > 0


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (QUICKSTART / name).read_text(encoding="utf-8").splitlines()]


def sentences(text: str) -> int:
    return len(re.findall(r"[.!?](?=\s|$)", text))


def test_quickstart_answers_are_one_sentence_and_no_question_stands_twice():
    questions, preferences = rows("questions.jsonl"), rows("preferences.jsonl")
    assert len(questions) == 273
    assert len(preferences) == 140
    prompts = [row["instruction"] for row in questions] + [row["prompt"] for row in preferences]
    normalised = [re.sub(r"\W+", " ", prompt.lower()).strip() for prompt in prompts]
    assert len(set(normalised)) == len(normalised)
    for row in questions:
        assert sentences(row["output"]) == 1, row
    for row in preferences:
        assert sentences(row["chosen"]) == 1, row
        assert sentences(row["rejected"]) >= 3, row
