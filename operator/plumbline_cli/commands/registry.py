"""The list of commands."""

from __future__ import annotations

import typer

from plumbline_cli.commands import control, initialize, logs, plan, report, run, status, validate, version, wait


def register(app: typer.Typer) -> None:
    """Add every command, in the order of `--help`."""
    app.command("init")(initialize.init)
    app.command("validate")(validate.validate)
    app.command("plan")(plan.plan)
    app.command("run")(run.run)
    app.command("status")(status.status)
    app.command("wait")(wait.wait)
    app.command("logs")(logs.logs)
    app.command("report")(report.report)
    app.command("suspend")(control.suspend)
    app.command("resume")(control.resume)
    app.command("retry")(control.retry)
    app.command("version")(version.version)
