"""Regular expressions of users over texts that a model wrote: a search that cannot hang."""

from __future__ import annotations

from collections.abc import Callable

import regex
from plumbline_api.errors import InputError

SECONDS = 5.0
"""Longest search in one text, in processor time; a sound expression needs microseconds for an answer."""


def make_search(pattern: str, place: str, seconds: float = SECONDS) -> Callable[[str], bool]:
    """Whether a text holds the expression, as Python's own syntax has it.

    Args:
        pattern: the expression.
        place: field path, for messages.
        seconds: longest search in one text.

    Raises:
        InputError: if it is no expression; the function raises it where a search takes longer.
    """
    try:
        compiled = regex.compile(pattern, regex.VERSION0)
    except regex.error as error:
        raise InputError(f'{place}: "{pattern}" is not a regular expression: {error}') from error

    def holds(text: str) -> bool:
        try:
            return compiled.search(text, timeout=seconds) is not None
        except TimeoutError:
            raise InputError(
                f'{place}: "{pattern}" was not found or ruled out within {seconds:g} s in an answer of {len(text)} '
                "characters; write it without repetitions inside repetitions, such as (a+)+"
            ) from None

    return holds
