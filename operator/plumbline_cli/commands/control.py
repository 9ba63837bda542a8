"""`plumbline suspend`, `resume` and `retry`: changes of a pipeline's spec on a cluster."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from plumbline_cli.commands.options import Context, Namespace, Output
from plumbline_cli.commands.targets import find_cluster_target
from plumbline_cli.exits import BAD_INPUT, CommandError
from plumbline_cli.output import Format, out, print_document

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a pipeline on the cluster.", show_default=False)]


def suspend(name: Name, namespace: Namespace = None, context: Context = None, output: Output = Format.TEXT) -> None:
    """Stop the running stages of a pipeline after a checkpoint, and start no others."""
    _patch(name, namespace, context, output, {"suspend": True}, "suspends: running stages stop after a checkpoint")


def resume(name: Name, namespace: Namespace = None, context: Context = None, output: Output = Format.TEXT) -> None:
    """Go on with a suspended pipeline, from its checkpoints."""
    _patch(name, namespace, context, output, {"suspend": False}, "goes on")


def retry(
    name: Name,
    stage: Annotated[
        str | None,
        typer.Argument(
            metavar="[STAGE]", help="Retry from this stage. Absent: every failed stage.", show_default=False
        ),
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    output: Output = Format.TEXT,
) -> None:
    """Try the failed stages of a pipeline again; what succeeded stays."""
    import secrets

    target = find_cluster_target(name, namespace=namespace, context=context)
    body = target.read()
    if stage is not None:
        declared = [item.get("name") for item in (body.get("spec") or {}).get("stages") or []]
        known = ["preflight", *declared, "finalize"]
        if stage not in known:
            raise CommandError(f'{name} has no stage "{stage}". Stages: {", ".join(map(str, known))}', BAD_INPUT)
    request: dict[str, Any] = {"nonce": secrets.token_hex(4), "stage": stage}
    changed = target.cluster.patch_spec(name, {"retry": request})
    _tell(changed, output, f"tries {'its failed stages' if stage is None else stage} again")


def _patch(
    name: str, namespace: str | None, context: str | None, output: Format, changes: dict[str, Any], words: str
) -> None:
    target = find_cluster_target(name, namespace=namespace, context=context)
    _tell(target.cluster.patch_spec(name, changes), output, words)


def _tell(body: dict[str, Any], output: Format, words: str) -> None:
    if output is Format.TEXT:
        out().print(f"{body['metadata']['name']} {words}")
    else:
        print_document(body, output)
