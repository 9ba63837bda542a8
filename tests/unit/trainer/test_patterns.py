"""Expressions of users: found as Python finds them, and never for long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plumbline_api.errors import InputError
from plumbline_trainer.patterns import make_search

PATTERNS = (
    r"^[^.!?\n]+[.!?]?$",
    r"\bplum(s)?\b",
    r"(?i)yes|no",
    r"^\d{1,3}$",
    r"[[:x]",
    r"<think>.*?</think>",
    r"(a|b)\1",
)


@pytest.mark.filterwarnings("ignore:Possible nested set")
@given(st.sampled_from(PATTERNS), st.text(alphabet="ab Yes.Plums1\n<think>/[:x", max_size=30))
def test_an_expression_means_what_python_says(pattern: str, text: str) -> None:
    assert make_search(pattern, "rewards[0].pattern")(text) == (re.search(pattern, text) is not None)


def test_an_expression_that_runs_away_is_named() -> None:
    holds = make_search(r"^(a|aa)+$", "rewards[0].pattern", seconds=0.2)
    started = time.process_time()
    with pytest.raises(
        InputError, match=r"rewards\[0\]\.pattern: .* within 0\.2 s in an answer of 61 characters; write"
    ):
        holds("a" * 60 + "!")
    assert time.process_time() - started < 5


def test_what_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r'rewards\[0\]\.pattern: "\(" is not a regular expression'):
        make_search("(", "rewards[0].pattern")
