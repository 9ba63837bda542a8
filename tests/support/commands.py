"""Calls of the `plumbline` command in this process, as a shell would see them."""

from dataclasses import dataclass
from typing import Any

import pytest
from plumbline_cli import main as entry


@dataclass(frozen=True)
class Ended:
    """How a call ended."""

    code: int
    out: str
    err: str


class CommandLine:
    """Calls the command and returns exit code and output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.delenv("PLUMBLINE_DEBUG", raising=False)

    def __call__(self, *arguments: Any, program: str = "plumbline") -> Ended:
        self._capsys.readouterr()
        self._monkeypatch.setattr("sys.argv", [program, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            entry.main()
        captured = self._capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)
