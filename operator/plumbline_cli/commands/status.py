"""`plumbline status`: where a pipeline stands, on this machine or on a cluster."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from plumbline_cli.commands.options import Context, Namespace, Output, PipelineChoice, Storage, Target
from plumbline_cli.commands.targets import LocalTarget, find_target
from plumbline_cli.output import Format, err, out, print_document


def status(
    target: Target,
    storage: Storage = None,
    namespace: Namespace = None,
    context: Context = None,
    pipeline: PipelineChoice = None,
    output: Output = Format.TEXT,
) -> None:
    """Show where a pipeline stands: a line per stage, and what is wrong in the words of its status."""
    from plumbline_api.status import PipelineStatus

    from plumbline_cli.commands.run import document_of
    from plumbline_cli.display.overview import print_overview

    found = find_target(target, storage=storage, namespace=namespace, context=context, pipeline=pipeline)
    body: dict[str, Any]
    if isinstance(found, LocalTarget):
        body, state = found.state.body, found.state.status
        document = document_of(body, state.to_wire())
    else:
        document = body = found.read()
        state = PipelineStatus.model_validate(body.get("status") or {})
    if output is not Format.TEXT:
        print_document(document, output)
        return
    print_overview(out(), body, state, datetime.now(UTC))
    if (
        isinstance(found, LocalTarget)
        and state.phase not in ("Succeeded", "Failed", "Refused")
        and not found.is_running
    ):
        err().print(f"  nobody runs it right now; it goes on with: {found.command_to_go_on}", style="dim")
