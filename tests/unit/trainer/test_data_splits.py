"""Splits: by normalised prompt, near the asked share, the same for ever."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st
from plumbline_trainer.data.rows import Message, Response, Row
from plumbline_trainer.data.splits import normalise, position, prompt_group, split_of


def row(text: str) -> Row:
    prompt = (Message("user", text),)
    return Row("id", prompt_group(prompt), prompt, (Response("0", (Message("assistant", "a"),)),))


@given(st.text(min_size=1))
def test_prompts_that_differ_only_in_form_fall_alike(text: str) -> None:
    other = f"  {unicodedata.normalize('NFD', text)}\n"
    assert prompt_group((Message("user", text),)) == prompt_group((Message("user", other),))


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_case_width_and_white_space_do_not_count() -> None:
    assert normalise("Was  Ist\tStraße?") == normalise("was ist strasse?") == normalise("Ｗas ist Straße?")


def test_shares_are_near_what_was_asked() -> None:
    settings = {"split": {"evaluation": 0.2, "test": 0.1}}
    found = [split_of(row(f"prompt {i}"), settings) for i in range(5000)]
    assert abs(found.count("test") / 5000 - 0.1) < 0.015
    assert abs(found.count("evaluation") / 5000 - 0.2) < 0.02


def test_a_larger_test_share_keeps_what_was_test() -> None:
    small = {"split": {"test": 0.1}}
    large = {"split": {"test": 0.3}}
    rows = [row(f"prompt {i}") for i in range(500)]
    assert all(split_of(r, large) == "test" for r in rows if split_of(r, small) == "test")


def test_role_test_holds_everything_out() -> None:
    assert {split_of(row(f"p{i}"), {"role": "test"}) for i in range(20)} == {"test"}


def test_positions_are_part_of_the_contract() -> None:
    """A change here moves rows between train and test of everybody's datasets."""
    assert prompt_group((Message("user", "What is the capital of France?"),)) == "c990cc06e5e77570e5f03360426d2b7f"
    assert round(position("00" * 16), 12) == 0.425996988649


def test_documents_fall_by_their_beginning() -> None:
    assert prompt_group((), "x" * 300 + "a") == prompt_group((), "x" * 300 + "b")
    assert prompt_group((), "a") != prompt_group((), "b")
