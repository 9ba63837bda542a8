"""Rules on the text of answers, by examples that were worked out by hand."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from plumbline_api.online import Reward
from plumbline_trainer.data.rows import Message
from plumbline_trainer.engine.distributed import Ranks
from plumbline_trainer.errors import InputError
from plumbline_trainer.patterns import make_search
from plumbline_trainer.rewards import schemas
from plumbline_trainer.rewards.interface import Candidate
from plumbline_trainer.rewards.rules import RuleReward, last_number, make_rule, repeated_share


def score(answer: str, reference: str | None = None, tokens: int = 7, **fields: Any) -> float:
    rule = make_rule(Reward.model_validate(fields), "rewards[0]")
    candidate = Candidate((Message("user", "?"),), answer, tokens, reference, "row-3")
    return float(RuleReward(rule).score([candidate], Ranks())[0])


def test_length_is_the_number_of_sampled_tokens() -> None:
    assert score("whatever", tokens=41, rule="length") == 41


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two", 0.0),
        ("one two three four", 0.0),
        ("a b c a b c", 0.25),  # abc bca cab abc: three of four are new
        ("no no no no no", 2 / 3),  # three times the same
        ("No NO no nO no", 2 / 3),
        ("wow! wow! wow!", 0.5),  # wow!wow !wow! wow!wow !wow!
        ("墙墙墙墙墙", 2 / 3),  # characters of a script without spaces are words
    ],
)
def test_repetition_is_the_share_of_trigrams_that_stood_before(text: str, share: float) -> None:
    assert repeated_share(text) == pytest.approx(share)
    assert score(text, rule="repetition") == pytest.approx(share)


@pytest.mark.parametrize(("answer", "value"), [("so: <b>1</b>", 1.0), ("so: 1", 0.0)])
def test_matches(answer: str, value: float) -> None:
    assert score(answer, rule="matches", pattern=r"<b>\d+</b>") == value


def test_keywords_are_the_share_that_is_found_without_regard_to_case() -> None:
    wanted = ["plumb line", "WALL", "straße"]
    assert score("The Plumb Line shows it.", rule="keywords", keywords=wanted) == pytest.approx(1 / 3)
    assert score("plumb line, wall, STRASSE", rule="keywords", keywords=wanted) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [("blue", "blue", 1.0), (" blue\n", "blue", 1.0), ("Blue", "blue", 0.0), ("blue.", "blue", 0.0)],
)
def test_exact_match_leaves_only_the_space_around_aside(answer: str, reference: str, value: float) -> None:
    assert score(answer, reference, rule="exactMatch") == value


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("none at all", None),
        ("It is 42.", 42.0),
        ("first 3, then 4", 4.0),
        ("1,234.50 crowns", 1234.5),
        ("-7", -7.0),
        ("−7", -7.0),
        ("x=-2", -2.0),
        ("the range 3-5", 5.0),
        ("f(2)-1", 1.0),
        (".5", 0.5),
        ("2e-3", 0.002),
        ("1, 2, 3", 3.0),
        ("12,34", 34.0),
        ("#### 1,000", 1000.0),
        ("version 1.2.3", 3.0),
    ],
)
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("answer", "value"), [("so 18", 1.0), ("18.0 in all", 1.0), ("18 of 20", 0.0), ("eighteen", 0.0), ("", 0.0)]
)
def test_numeric_match_compares_the_last_numbers(answer: str, value: float) -> None:
    assert score(answer, "9 + 9 = 18\n#### 18", rule="numericMatch") == value


@pytest.mark.parametrize("rule", ["exactMatch", "numericMatch"])
def test_a_row_without_an_answer_cannot_be_compared_with(rule: str) -> None:
    with pytest.raises(InputError, match=r"rewards\[0\]: compares with .* row row-3 has none"):
        score("1", None, rule=rule)


def test_a_row_whose_answer_is_no_number_is_named() -> None:
    with pytest.raises(InputError, match="row row-3 holds none"):
        score("1", "the sea", rule="numericMatch")


SCHEMA = json.dumps({"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]})


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"age": 3}', 1.0),
        (' {"age": 3, "name": "x"}\n', 1.0),
        ('{"age": -3}', 0.0),
        ('{"age": "3"}', 0.0),
        ("{}", 0.0),
        ('It is {"age": 3}', 0.0),
        ("", 0.0),
        ('{"age": NaN}', 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_schema_takes_the_whole_answer(answer: str, value: float) -> None:
    assert score(answer, rule="jsonSchema", schema=SCHEMA) == value


def test_a_schema_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"rewards\[0\]\.schema: is not a JSON schema \(at type\): 'set' is not valid"):
        score("{}", rule="jsonSchema", schema='{"type": "set"}')


@pytest.mark.parametrize("target", ["http://127.0.0.1:9/schema.json", "#/$defs/absent"])
def test_a_schema_leads_nowhere_outside_itself(target: str) -> None:
    with pytest.raises(InputError, match=r"rewards\[0\]\.schema: refers to .*, which is not in it"):
        score("{}", rule="jsonSchema", schema=json.dumps({"$ref": target}))


def test_expressions_of_a_schema_are_searched_within_time_and_must_be_some() -> None:
    words = json.dumps({"type": "object", "properties": {"word": {"type": "string", "pattern": "^[a-z]+$"}}})
    assert score('{"word": "plumb"}', rule="jsonSchema", schema=words) == 1.0
    assert score('{"word": "PLUMB"}', rule="jsonSchema", schema=words) == 0.0
    with pytest.raises(InputError, match=r"rewards\[0\]\.schema: is not a JSON schema \(at pattern\): .*regex"):
        score('"a"', rule="jsonSchema", schema='{"pattern": "("}')


def test_an_expression_of_a_schema_that_runs_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "make_search", partial(make_search, seconds=0.2))
    slow, texts = "^(a|aa)+$", "a" * 60 + "!"
    for schema, answer in (
        ({"pattern": slow}, texts),
        ({"patternProperties": {slow: {"type": "string"}}}, {texts: "x"}),
        ({"additionalProperties": False, "patternProperties": {slow: {}}}, {texts: "x"}),
    ):
        with pytest.raises(InputError, match=r"rewards\[0\]\.schema: .* was not found or ruled out within 0\.2 s"):
            score(json.dumps(answer), rule="jsonSchema", schema=json.dumps(schema))


def test_what_no_limit_of_time_reaches_is_refused() -> None:
    schema = {"unevaluatedProperties": False, "patternProperties": {"^a": {}}}
    with pytest.raises(InputError, match=r"rewards\[0\]\.schema: unevaluatedProperties .* say additionalProperties"):
        score("{}", rule="jsonSchema", schema=json.dumps({"$defs": {"inner": schema}}))
    alone = json.dumps({"properties": {"a": {}}, "unevaluatedProperties": False})
    assert score('{"a": 1}', rule="jsonSchema", schema=alone) == 1.0
    assert score('{"b": 1}', rule="jsonSchema", schema=alone) == 0.0


NAMES, EXPRESSIONS = ("a", "ab", "b1", "z"), ("^a", "b", "[0-9]$", "^ab$")
INNER = st.sampled_from([True, False, {"type": "integer"}, {"type": "string", "pattern": "^a"}, {"minimum": 2}])
OBJECTS = st.dictionaries(st.sampled_from(NAMES), st.sampled_from([1, 3, "a", "ba", None, {"a": 1}]))
SCHEMAS = st.fixed_dictionaries(
    {},
    optional={
        "properties": st.dictionaries(st.sampled_from(NAMES), INNER, max_size=2),
        "patternProperties": st.dictionaries(st.sampled_from(EXPRESSIONS), INNER, max_size=2),
        "additionalProperties": INNER,
        "required": st.lists(st.sampled_from(NAMES), unique=True, max_size=1),
    },
)


@given(SCHEMAS, st.one_of(OBJECTS, st.sampled_from(["a", 1])))
def test_schemas_mean_what_the_library_says(schema: dict[str, Any], value: Any) -> None:
    expected = Draft202012Validator(schema).is_valid(value)
    assert score(json.dumps(value), rule="jsonSchema", schema=json.dumps(schema)) == float(expected)
