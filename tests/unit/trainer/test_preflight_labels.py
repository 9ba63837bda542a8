"""What preflight says of labelled answers: one-sided and unbalanced ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.preflighting import pairs, pipeline, plan_of, preflight, rows
from support.trainer import LocalPipeline, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "base")


def thumbs(good: int, bad: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {i}", "completion": f"It is {i}.", "label": i < good} for i in range(good + bad)]


def kto_pipeline(
    folder: Path, model: Path, rows: list[dict[str, Any]], *, evaluation: float = 0.0, **fields: Any
) -> LocalPipeline:
    write_jsonl(folder / "q.jsonl", rows)
    write_jsonl(folder / "p.jsonl", pairs())
    stage = {"dataset": "q", "lora": {"rank": 4}, "training": {"maxLength": 64, "globalBatch": 8}} | fields
    return pipeline(folder, model, [{"name": "thumbs", "kto": stage}], split={"evaluation": evaluation})


def test_one_sided_labels_are_refused_before_anything_trains(tmp_path: Path, model: Path) -> None:
    result, code = preflight(kto_pipeline(tmp_path, model, thumbs(0, 12)))
    assert code == 2
    assert result.message.startswith('spec.stages[0].kto.dataset: "q" holds only undesirable answers (12)')
    assert "Add rows with label true" in result.message


@pytest.mark.parametrize(
    ("good", "bad", "fields", "said"),
    [(10, 10, {}, None), (20, 10, {}, "between 0.5 and 0.667"), (20, 10, {"undesirableWeight": 1.6}, None)],
)
def test_weights_out_of_balance_are_noted(
    tmp_path: Path, model: Path, good: int, bad: int, fields: dict[str, Any], said: str | None
) -> None:
    result, code = preflight(kto_pipeline(tmp_path, model, thumbs(good, bad), **fields))
    assert code == 0, result.message
    assert result.preflight is not None
    found = [note for note in result.preflight.notes if note.startswith("thumbs: ")]
    assert len(found) == (said is not None)
    if said is not None:
        assert said in found[0]
    assert any(
        f"q: unpaired, {good + bad} rows" in note and f"{good} desirable" in note for note in result.preflight.notes
    )


def test_a_single_held_out_row_is_refused(tmp_path: Path, model: Path) -> None:
    """Of these ten rows a tenth is one row."""
    result, code = preflight(kto_pipeline(tmp_path, model, thumbs(5, 5), evaluation=0.1))
    assert code == 2
    assert result.message == (
        'spec.stages[0].kto.dataset: "q" has one row in its evaluation split; kto compares rows with each other. '
        "Add rows, or change datasets[].split"
    )


def test_pairs_are_balanced_answers(tmp_path: Path, model: Path) -> None:
    made = kto_pipeline(tmp_path, model, thumbs(3, 3), dataset="p")
    result, code = preflight(made)
    assert code == 0, result.message
    assert result.preflight is not None
    assert not [note for note in result.preflight.notes if note.startswith("thumbs: ")]


def test_answers_of_other_rows_are_counted(tmp_path: Path, model: Path) -> None:
    """Of the same pairs kto takes twice the tokens of dpo: every answer is compared with one of another row."""
    training = {"maxLength": 64, "globalBatch": 8}
    stages = [{"name": name, name: {"dataset": "p", "training": training}} for name in ("dpo", "kto")]
    made = pipeline(tmp_path, model, stages)
    result, code = preflight(made)
    assert code == 0, result.message
    pairs_alone, compared = (item["estimate"]["tokens"] for item in plan_of(made)["stages"])
    assert compared == pytest.approx(2 * pairs_alone, abs=2)


@pytest.mark.parametrize("field", ["rehearsal", "ewc"])
def test_what_is_held_against_forgetting_needs_no_labels(tmp_path: Path, model: Path, field: str) -> None:
    value: Any = {"dataset": "old"} if field == "ewc" else [{"dataset": "old", "share": 0.25}]
    old = {"name": "old", "source": write_jsonl(tmp_path / "old.jsonl", rows()), "split": {"evaluation": 0, "test": 0}}
    write_jsonl(tmp_path / "q.jsonl", thumbs(20, 20))
    write_jsonl(tmp_path / "p.jsonl", pairs())
    scored = [{"prompt": f"Say {i}", "completion": f"It is {i}.", "score": float(i)} for i in range(20)]
    s = {"name": "s", "source": write_jsonl(tmp_path / "s.jsonl", scored), "split": {"evaluation": 0, "test": 0}}
    shared = {"lora": {"rank": 4}, "training": {"maxLength": 64, "globalBatch": 8}, field: value}
    stages = [{"name": name, name: {"dataset": data, **shared}} for name, data in (("kto", "q"), ("awr", "s"))]
    result, code = preflight(pipeline(tmp_path, model, stages, others=(old, s), split={"evaluation": 0.0}))
    assert code == 0, result.message
