"""Under CI a skip must be announced: named with its reason in `tests/allowed_skips.txt`, or it fails the run.

Each line holds a test (its node id, `*` matches anything), a tab, and a text that the reason of the skip must contain.
"""

import fnmatch
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

ALLOWED_SKIPS = Path(__file__).resolve().parent.parent / "allowed_skips.txt"


@dataclass(frozen=True)
class AllowedSkip:
    """One line of the list."""

    name: str
    reason: str

    def covers(self, test: str, reason: str) -> bool:
        return fnmatch.fnmatchcase(test, self.name) and self.reason in reason


def parse_allowed_skips(text: str) -> list[AllowedSkip]:
    """Lines `name<TAB>reason`; empty lines and lines that start with # are comments."""
    allowed = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, tab, reason = line.partition("\t")
        if not tab or not reason.strip():
            raise ValueError(
                f"allowed_skips.txt line {number}: expected the test's name, a tab and the reason, found {line!r}"
            )
        allowed.append(AllowedSkip(name.strip(), reason.strip()))
    return allowed


def find_unannounced(skips: list[tuple[str, str]], allowed: list[AllowedSkip]) -> list[tuple[str, str]]:
    """The skips (test, reason) that no line covers."""
    return [(test, reason) for test, reason in skips if not any(line.covers(test, reason) for line in allowed)]


class SkipGuard:
    """Collects skips as they are reported and fails the session over those that are not announced."""

    def __init__(self, allowed: list[AllowedSkip]) -> None:
        self.allowed = allowed
        self.skips: list[tuple[str, str]] = []

    def record(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skips.append((report.nodeid, reason))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.record(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.record(report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return  # the controlling process sees every worker's reports
        if find_unannounced(self.skips, self.allowed) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        unannounced = find_unannounced(self.skips, self.allowed)
        if unannounced:
            terminalreporter.section(
                "skips that tests/allowed_skips.txt does not list: under CI they fail the run", red=True
            )
            for test, reason in unannounced:
                terminalreporter.write_line(f"{test}\t{reason}")


def pytest_configure(config: pytest.Config) -> None:
    """Guard only where CI=true; on a developer's machine a skip says its remedy and that is all."""
    if os.environ.get("CI") == "true":
        config.pluginmanager.register(SkipGuard(parse_allowed_skips(ALLOWED_SKIPS.read_text())), "plumbline-skip-guard")
