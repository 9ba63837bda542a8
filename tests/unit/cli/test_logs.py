from pathlib import Path

from plumbline_cli.commands import logs


def test_following_misses_nothing_and_ends_with_the_stage(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(logs, "POLL_SECONDS", 0.0)
    path = tmp_path / "log.txt"
    path.write_text("one\ntwo\nthr")
    steps = iter([("", False), ("ee\nfour\n", False), ("last", True)])

    def is_over() -> bool:
        text, over = next(steps)
        with path.open("a") as file:
            file.write(text)
        return over

    assert list(logs.read_lines(path, tail=None, is_over=is_over)) == ["one", "two", "three", "four", "last"]


def test_tail(tmp_path: Path):
    path = tmp_path / "log.txt"
    path.write_text("one\ntwo\nthree\n")
    assert list(logs.read_lines(path, tail=None, is_over=None)) == ["one", "two", "three"]
    assert list(logs.read_lines(path, tail=2, is_over=None)) == ["two", "three"]
    assert list(logs.read_lines(path, tail=0, is_over=None)) == []
