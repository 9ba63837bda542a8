"""Raw records to rows: every format, every file type, and what is said about bad rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plumbline_api.artifacts import FORMAT_FIELDS
from plumbline_trainer.data.dialogues import common_text, parse_dialogue
from plumbline_trainer.data.formats import EVERYWHERE, OPTIONAL, REQUIRED, BadRowError, parse_dataset, parse_record
from plumbline_trainer.data.records import Record, SourceFile
from plumbline_trainer.data.rows import Row
from plumbline_trainer.errors import InputError

PREFS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(3)]


def files(tmp_path: Path, content: str | bytes, name: str = "data.jsonl") -> list[SourceFile]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [SourceFile(f"s3://corpus/{name}", path)]


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def turns(row: Row) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in (*row.prompt, *row.responses[0].messages)]


@pytest.mark.parametrize(
    ("record", "format_", "expected"),
    [
        ({"text": "plain words"}, "text", [("text", "plain words")]),
        ({"instruction": "Do", "output": "Done"}, "instruction", [("user", "Do"), ("assistant", "Done")]),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            "instruction",
            [("user", "Add\n\n1 2"), ("assistant", "3")],
        ),
        (
            {"instruction": "Do", "input": "", "output": "Done"},
            "instruction",
            [("user", "Do"), ("assistant", "Done")],
        ),
        ({"context": "Q", "response": "A"}, "contextResponse", [("user", "Q"), ("assistant", "A")]),
        ({"prompt": "Q", "completion": "A"}, "promptCompletion", [("user", "Q"), ("assistant", "A")]),
        (
            {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}], "completion": "A"},
            "promptCompletion",
            [("system", "S"), ("user", "Q"), ("assistant", "A")],
        ),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            "messages",
            [("user", "Q"), ("assistant", "A")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, {"role": "assistant", "content": "A"}]},
            "messages",
            [("user", "Q"), ("assistant", "A")],
        ),
        ({"dialogue": "USER: Q ASSISTANT: A"}, "dialogue", [("user", "Q"), ("assistant", "A")]),
        ({"text": "USER: Q\nASSISTANT: A"}, "dialogue", [("user", "Q"), ("assistant", "A")]),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "preference", [("user", "Q"), ("assistant", "A")]),
        ({"prompt": "Q", "completion": "A", "label": True}, "unpaired", [("user", "Q"), ("assistant", "A")]),
        ({"prompt": "Q", "completion": "", "label": False}, "unpaired", [("user", "Q"), ("assistant", "")]),
        ({"prompt": "Q", "completion": "A", "score": 0.5}, "scored", [("user", "Q"), ("assistant", "A")]),
    ],
)  # fmt: skip
def test_each_format_is_detected_and_parsed(
    tmp_path: Path, record: dict[str, Any], format_: str, expected: list[tuple[str, str]]
) -> None:
    found = parse_dataset(files(tmp_path, lines(record)), "d", {"format": "auto"})
    assert found.format == format_
    assert turns(found.rows[0]) == expected


@pytest.mark.parametrize(("score", "found"), [(2, 2.0), (-0.5, -0.5), ("1e-3", 0.001)])
def test_scores_are_numbers_also_as_text(tmp_path: Path, score: Any, found: float) -> None:
    record = {"prompt": "Q", "completion": "A", "score": score}
    assert parse_dataset(files(tmp_path, lines(record)), "d", {}).rows[0].responses[0].score == found


@pytest.mark.parametrize(
    ("score", "shown"), [("good", '"good"'), (True, "true or false"), ("nan", '"nan"'), ([1], "a list")]
)
def test_scores_that_are_no_numbers_are_refused_with_line_and_remedy(tmp_path: Path, score: Any, shown: str) -> None:
    rows = lines({"prompt": "Q", "completion": "A", "score": 1}, {"prompt": "Q", "completion": "B", "score": score})
    with pytest.raises(InputError, match="line 2") as caught:
        parse_dataset(files(tmp_path, rows), "d", {})
    assert f'"score" is {shown}, a finite number expected' in str(caught.value)
    assert "format: promptCompletion" in str(caught.value)


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (True, "desirable"),
        (False, "undesirable"),
        (1, "desirable"),
        (0, "undesirable"),
        (1.0, "desirable"),
        ("true", "desirable"),
        ("False", "undesirable"),
        ("0", "undesirable"),
    ],
)
def test_labels_are_true_and_false_or_1_and_0(tmp_path: Path, label: Any, found: str) -> None:
    record = {"prompt": "Q", "completion": "A", "label": label}
    assert parse_dataset(files(tmp_path, lines(record)), "d", {}).rows[0].responses[0].label == found


@pytest.mark.parametrize(
    ("label", "shown"),
    [("good", '"good"'), (2, "2"), (-1, "-1"), (0.5, "0.5"), (None, "null"), ([True], "a list"), ("", '""')],
)
def test_labels_that_are_not_boolean_are_refused_with_file_line_and_remedy(
    tmp_path: Path, label: Any, shown: str
) -> None:
    good = {"prompt": "Q", "completion": "A", "label": True}
    with pytest.raises(InputError) as caught:
        parse_dataset(files(tmp_path, lines(good, good | {"label": label})), "d", {"format": "unpaired"})
    words = str(caught.value)
    assert "data.jsonl line 2" in words
    assert f'"label" is {shown}; true or false (or 1 or 0) expected' in words
    assert "Convert the column" in words


def test_labels_of_a_csv_file_are_text(tmp_path: Path) -> None:
    content = "prompt,completion,label\nQ,A,True\nQ,B,0\n"
    found = parse_dataset(files(tmp_path, content, "data.csv"), "d", {})
    assert found.format == "unpaired"
    assert [row.responses[0].label for row in found.rows] == ["desirable", "undesirable"]


def test_an_empty_completion_cannot_be_desirable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="empty"):
        parse_dataset(files(tmp_path, lines({"prompt": "Q", "completion": " ", "label": 1})), "d", {})


def test_a_label_of_another_kind_is_left_alone_where_the_format_is_named(tmp_path: Path) -> None:
    record = {"prompt": "Q", "completion": "A", "label": "billing"}
    found = parse_dataset(files(tmp_path, lines(record)), "d", {"format": "promptCompletion"})
    assert found.rows[0].responses[0].label is None


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "answers"),
    [
        ("USER: Q ASSISTANT: A", "USER: Q ASSISTANT: B", [("user", "Q")], ("A", "B")),
        (
            "USER: Q ASSISTANT: R USER: S ASSISTANT: A",
            "USER: Q ASSISTANT: R USER: S ASSISTANT: B",
            [("user", "Q"), ("assistant", "R"), ("user", "S")],
            ("A", "B"),
        ),
        (
            "Question: why?\nBecause.",
            "Question: why?\nNo idea.",
            [("user", "Question: why?")],
            ("Because.", "No idea."),
        ),
        ("It is four", "It is five", [("user", "It is")], ("four", "five")),
    ],
)
def test_preference_rows_without_a_prompt_share_their_beginning(
    tmp_path: Path, chosen: str, rejected: str, prompt: list[tuple[str, str]], answers: tuple[str, str]
) -> None:
    row = parse_dataset(files(tmp_path, lines({"chosen": chosen, "rejected": rejected})), "d", {}).rows[0]
    assert [(m.role, m.content) for m in row.prompt] == prompt
    assert tuple(r.text for r in row.responses) == answers
    assert [r.label for r in row.responses] == ["chosen", "rejected"]


def test_answers_given_as_messages_may_repeat_the_prompt(tmp_path: Path) -> None:
    question = {"role": "user", "content": "Q"}
    row = {
        "prompt": "Q",
        "chosen": [question, {"role": "assistant", "content": "A"}],
        "rejected": [question, {"role": "assistant", "content": "B"}],
    }
    without = {key: value for key, value in row.items() if key != "prompt"}
    for record in (row, without):
        parsed = parse_dataset(files(tmp_path, lines(record)), "d", {}).rows[0]
        assert [m.content for m in parsed.prompt] == ["Q"]
        assert [len(r.messages) for r in parsed.responses] == [1, 1]


def test_every_file_type_yields_the_same_rows(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(PREFS)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    written = {
        "a.jsonl": lines(*PREFS).encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + lines(*PREFS).encode(),
        "b.json": json.dumps(PREFS).encode(),
        "wrapped.json": json.dumps({"version": 1, "data": PREFS}).encode(),
        "c.csv": b"prompt,chosen,rejected\r\n"
        + b"".join(f"{r['prompt']},{r['chosen']},{r['rejected']}\r\n".encode() for r in PREFS),
        "d.parquet": (tmp_path / "x.parquet").read_bytes(),
    }
    rows = [parse_dataset(files(tmp_path, data, name), "d", {}).rows for name, data in written.items()]
    identities = [[(row.id, row.group) for row in found] for found in rows]
    assert all(found == identities[0] for found in identities)
    assert len(identities[0]) == 3


def test_text_files_are_paragraphs_with_their_lines(tmp_path: Path) -> None:
    content = "First\nparagraph.\n\n\nSecond.\r\n  \r\nThird.\n"
    rows = parse_dataset(files(tmp_path, content, "a.txt"), "d", {}).rows
    assert [row.responses[0].text for row in rows] == ["First\nparagraph.", "Second.", "Third."]
    assert [row.source for row in rows] == [f"s3://corpus/a.txt line {n}" for n in (1, 5, 7)]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"prompt": "p", "chosen": 7, "rejected": "b"}, '"chosen" is a number, text expected'),
        ({"prompt": "p", "chosen": "a"}, 'no column "rejected"; the columns are: chosen, prompt'),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, '"chosen" is empty'),
        ({"prompt": None, "chosen": "xy", "rejected": "zw"}, "share no beginning"),
        (["a"], "a list, an object with named fields expected"),
        ({"prompt": "p", "chosen": [{"role": "human", "content": "x"}], "rejected": "b"}, 'is "human"; roles are'),
        (
            {"prompt": "p", "chosen": [{"role": "user", "content": "x"}], "rejected": "b"},
            "begins with a turn of the user",
        ),
        ({"prompt": {}, "chosen": "a", "rejected": "b"}, '"prompt" is an object'),
    ],
)
def test_bad_rows_name_file_line_fault_and_remedy(tmp_path: Path, bad: Any, said: str) -> None:
    content = lines(*PREFS, bad, *PREFS)
    with pytest.raises(InputError) as caught:
        parse_dataset(files(tmp_path, content, "prefs.jsonl"), "prefs", {"format": "preference"})
    text = str(caught.value)
    assert text.startswith("s3://corpus/prefs.jsonl line 4: ")
    assert said in text
    assert text.endswith("(1 bad row of 7; allow some with datasets[].maxBadRows)")


def test_broken_json_names_its_line_and_is_counted(tmp_path: Path) -> None:
    content = lines(PREFS[0]) + '{"prompt": \n' + "\n" + "{\n" + lines(PREFS[1])
    with pytest.raises(InputError, match=r"line 2: not JSON \(.*2 bad rows of 4"):
        parse_dataset(files(tmp_path, content), "d", {})
    with pytest.raises(InputError, match="2 bad rows of 4, 1 allowed"):
        parse_dataset(files(tmp_path, content), "d", {"maxBadRows": 1})
    found = parse_dataset(files(tmp_path, content), "d", {"maxBadRows": 2})
    assert (len(found.rows), found.bad_count) == (2, 2)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8"),
        ("a.json", b'{"text": "x"}\n{"text": "y"}', "name the file .jsonl"),
        ("a.json", b'{"text": "x"', "not JSON"),
        ("a.json", b'"text"', "a list of objects expected"),
        ("a.csv", b"a,b\n1,2,3\n", "3 cells, the header has 2"),
        ("a.csv", b"a,b\n1\n", "1 cells, the header has 2"),
        ("a.csv", b'text\n"open', "not CSV"),
        ("a.parquet", b"PAR1 is not enough", "not a readable Parquet file"),
        ("a.txt", b"\xff", "line 1: not UTF-8"),
        ("a.jsonl", b"", 'dataset "d" (s3://corpus/a.jsonl) has no readable rows'),
        ("a.jsonl", b'{"text": "x\ny"}', "not JSON (invalid control character at character"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "s3://corpus/a.jsonl is compressed by gzip. Unpack it"),
        ("a.csv", b"a;b\n1;2\n", 'line 1: columns are separated by ";". Separate them by commas'),
        ("a.csv", b"a\tb\n1\t2\n", "line 1: columns are separated by tabs. Separate them by commas"),
        ("a.jsonl", b"\n\n", "no readable rows"),
        ("a.bin", b"x", "the suffix says how rows are stored"),
        ("a.jsonl", b'{"question": "q", "answer": "a"}', "columns (answer, question) fit no format"),
    ],
)
def test_unreadable_files_say_what_is_wrong(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_dataset(files(tmp_path, content, name), "d", {"format": "auto" if ".csv" not in name else "text"})
    assert said in str(caught.value)


def test_columns_are_mapped_and_checked(tmp_path: Path) -> None:
    content = lines({"q": "Q", "good": "A", "bad": "B", "w": "0.5"})
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "weight": "w"}
    row = parse_dataset(files(tmp_path, content), "d", {"columns": columns}).rows[0]
    assert (row.prompt[0].content, row.chosen.text, row.weight) == ("Q", "A", 0.5)
    for weight, said in ((float("nan"), "no finite number"), (-1, "a negative number"), ("heavy", "text")):
        bad = lines({"q": "Q", "good": "A", "bad": "B", "w": weight})
        with pytest.raises(InputError, match=f'"w" is {said}, a number of at least 0 expected'):
            parse_dataset(files(tmp_path, bad), "d", {"columns": columns})
    with pytest.raises(InputError, match='names a field "promt"'):
        parse_dataset(files(tmp_path, content), "d", {"format": "preference", "columns": {"promt": "q"}})
    with pytest.raises(InputError, match='no column "better"; the columns are: bad, good, q, w'):
        parse_dataset(files(tmp_path, content), "d", {"format": "preference", "columns": {"chosen": "better"}})


def test_limit_counts_records_and_equal_rows_keep_names_of_their_own(tmp_path: Path) -> None:
    content = lines({"text": "same"}, {"text": "same"}, {"text": "other"})
    found = parse_dataset(files(tmp_path, content), "d", {"limit": 2})
    assert found.records == 2
    assert found.rows[1].id == f"{found.rows[0].id}-2"


def test_pairs_with_equal_answers_are_counted(tmp_path: Path) -> None:
    content = lines(*PREFS, {"prompt": "p", "chosen": "same", "rejected": "same"})
    assert parse_dataset(files(tmp_path, content), "d", {}).equal_pairs == 1


def ranked(*completions: Any) -> dict[str, Any]:
    return {"prompt": "Q", "completions": list(completions)}


@pytest.mark.parametrize(
    ("completions", "expected"),
    [
        (("A", "B", "C"), [("A", 0, None), ("B", 1, None), ("C", 2, None)]),
        (
            ({"text": "C", "score": -1}, {"text": "A", "score": 2.5}, {"text": "B", "score": 0}),
            [("A", 0, 2.5), ("B", 1, 0), ("C", 2, -1)],
        ),
        (({"completion": "B", "rank": 7}, {"content": "A", "rank": 1}), [("A", 0, None), ("B", 1, None)]),
        (
            ({"text": "B", "score": 1}, {"text": "A", "score": 3}, {"text": "C", "score": 1}),
            [("A", 0, 3), ("B", 1, 1), ("C", 1, 1)],
        ),
        # Where both are given the rank decides.
        (({"text": "A", "rank": 0, "score": 1}, {"text": "B", "rank": 1, "score": 9}), [("A", 0, 1), ("B", 1, 9)]),
        (([{"role": "assistant", "content": "A"}], "B"), [("A", 0, None), ("B", 1, None)]),
        (("A", ""), [("A", 0, None), ("", 1, None)]),
    ],
)
def test_ranked_rows_are_read_best_first(
    tmp_path: Path, completions: tuple[Any, ...], expected: list[tuple[str, int, float | None]]
) -> None:
    found = parse_dataset(files(tmp_path, lines(ranked(*completions))), "d", {"format": "auto"})
    assert found.format == "ranked"
    (row,) = found.rows
    assert [(answer.text, answer.rank, answer.score) for answer in row.responses] == expected
    # As a pair: the best against the worst.
    chosen, rejected = row.labelled("chosen"), row.labelled("rejected")
    assert chosen is not None
    assert rejected is not None
    assert (chosen.text, rejected.text) == (expected[0][0], expected[-1][0])
    assert row.chosen is chosen


def test_a_preference_row_is_a_ranked_row_of_two(tmp_path: Path) -> None:
    (pair,) = parse_dataset(files(tmp_path, lines({"prompt": "Q", "chosen": "A", "rejected": "B"})), "d", {}).rows
    (both,) = parse_dataset(files(tmp_path, lines(ranked("A", "B"))), "d", {}).rows
    assert (pair.id, pair.group) == (both.id, both.group)
    assert [(a.text, a.rank, a.label) for a in pair.responses] == [(a.text, a.rank, a.label) for a in both.responses]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (ranked("A"), '"completions" holds 1 answer, at least two expected'),
        ({"prompt": "Q", "completions": "A"}, '"completions" is text, a list of answers expected'),
        (ranked("A", 7), '"completions[1]" is a number, text expected'),
        (ranked("", "B"), '"completions[0]" is empty'),
        (ranked("A", {"text": "B", "score": 1}), '"completions[0]" is text where others are objects'),
        (ranked({"text": "A", "score": 1}, {"text": "B", "rank": 1}), '"completions[1]" has no rank and no score'),
        (ranked({"text": "A", "score": "high"}, {"text": "B", "score": 1}), '"completions[0].score" is text, a finite'),
        (ranked({"text": "A", "rank": True}, {"text": "B", "rank": 1}), '"completions[0].rank" is true or false'),
        (ranked({"text": "A", "score": 1}, {"text": "B", "score": 1}), "all ranked the same"),
        (ranked({"score": 1}, {"text": "B", "score": 2}), '"completions[0]" has no answer; exactly one of text'),
        (
            ranked({"text": "A", "content": "A", "score": 1}, {"text": "B", "score": 2}),
            '"completions[0]" has text and content; exactly one of',
        ),
        ({"prompt": 3, "completions": ["A", "B"]}, '"prompt" is a number'),
    ],
)
def test_bad_ranked_rows_name_file_line_and_fault(tmp_path: Path, bad: Any, said: str) -> None:
    content = lines(ranked("A", "B"), bad)
    with pytest.raises(InputError) as caught:
        parse_dataset(files(tmp_path, content, "ranked.jsonl"), "ranked", {"format": "ranked"})
    assert str(caught.value).startswith("s3://corpus/ranked.jsonl line 2: ")
    assert said in str(caught.value)


def test_margins_are_read_by_name_or_by_column(tmp_path: Path) -> None:
    pair = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    rows = parse_dataset(files(tmp_path, lines(pair | {"margin": 0.5}, pair, pair | {"margin": None})), "d", {}).rows
    assert [row.margin for row in rows] == [0.5, 0.0, 0.0]
    assert rows[1].id == f"{rows[0].id}-2"
    mapped = {"columns": {"margin": "gap"}}
    (row,) = parse_dataset(files(tmp_path, lines(pair | {"gap": 2})), "d", mapped).rows
    assert row.margin == 2.0
    for bad in ("much", True, float("inf")):
        with pytest.raises(InputError, match=r'"gap" is .*, a finite number expected'):
            parse_dataset(files(tmp_path, lines(pair | {"gap": bad})), "d", mapped)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner)
    ),
    max_leaves=8,
)


def _records_of(format_: str) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """Records with the fields of a format, of which some are wrong."""
    names = [*REQUIRED[format_], *OPTIONAL.get(format_, ())]
    values = st.one_of(st.text(max_size=12), st.sampled_from(["USER: a ASSISTANT: b", "USER: a"]), JSON)
    return st.dictionaries(st.sampled_from(names), values, min_size=1).map(lambda value: (format_, value))


@given(st.sampled_from(list(REQUIRED)).flatmap(_records_of))
def test_any_record_is_a_row_or_a_named_fault(given_record: tuple[str, dict[str, Any]]) -> None:
    format_, value = given_record
    try:
        row = parse_record(Record("f line 1", value), format_, {})
    except BadRowError as error:
        fault = str(error)
    else:
        fault = None
    if fault is not None:
        assert fault != ""
        return
    assert row.responses or format_ == "prompt"
    assert row.is_text == (format_ == "text")
    assert all(turn.messages for turn in row.responses)
    if not row.is_text:
        assert any(message.role == "user" for message in row.prompt)
        assert all(r.messages[-1].role == "assistant" for r in row.responses)


WORDS = st.text(alphabet="abc d\n", min_size=1, max_size=12).map(str.strip).filter(bool)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_dialogues_come_back_turn_by_turn(pairs: list[tuple[str, str]]) -> None:
    for joint in ("\n", " ", "\n\n"):
        text = joint.join(f"USER: {question}{joint}ASSISTANT: {answer}" for question, answer in pairs)
        found = [(turn.role, turn.content) for turn in parse_dialogue(text)]
        assert found == [turn for q, a in pairs for turn in (("user", q), ("assistant", a))]


@given(st.text(max_size=20), st.text(max_size=20))
def test_the_common_text_begins_both(some: str, others: str) -> None:
    shared = common_text(some, others)
    assert some.startswith(shared)
    assert others.startswith(shared)


def test_words_that_only_look_like_turns_are_text() -> None:
    found = parse_dialogue("USER: what does the user: field mean?\nASSISTANT: It names the user: you.")
    assert [turn.role for turn in found] == ["user", "assistant"]
    assert parse_dialogue("A preamble. USER: hi ASSISTANT: ho")[0].role == "system"


@pytest.mark.parametrize("format_", FORMAT_FIELDS)
def test_the_checker_knows_the_fields_that_are_read(format_):
    assert FORMAT_FIELDS[format_] == (*REQUIRED[format_], *OPTIONAL.get(format_, ()), *EVERYWHERE)
