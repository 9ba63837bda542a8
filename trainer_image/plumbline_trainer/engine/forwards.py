"""What a module's forward says, so that another way of computing it is taken only where that is the same."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any


def body_of(forward: Callable[..., Any], arguments: Sequence[str]) -> list[ast.stmt]:
    """The statements of a forward with just these arguments; none where it has others or its source is not there."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return []
    if not isinstance(function, ast.FunctionDef) or [item.arg for item in function.args.args] != list(arguments):
        return []
    return function.body
