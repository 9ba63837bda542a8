"""`plumbline validate`: schema and type checker over manifest files."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from plumbline_cli.commands.options import Output
from plumbline_cli.exits import BAD_INPUT, OK, CommandError
from plumbline_cli.output import Format, err, out, print_document


class Where(StrEnum):
    """Where the pipeline shall run."""

    ANYWHERE = "anywhere"
    CLUSTER = "cluster"
    LOCAL = "local"


def validate(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE…", help="Manifests: YAML or JSON, several documents each.")
    ],
    where: Annotated[
        Where, typer.Option("--for", help="Check for a cluster (no local files), for a local run, or for both.")
    ] = Where.ANYWHERE,
    output: Output = Format.TEXT,
) -> None:
    """Check manifests: fields, references, and whether each stage takes what its inputs yield."""
    from plumbline_api.errors import Problem

    from plumbline_cli.manifests import Finding, InvalidManifestError, read_documents, validate_documents

    findings: list[Finding] = []
    documents, code = [], OK
    for file in files:
        try:
            documents += read_documents(file)
        except InvalidManifestError as error:
            findings += error.findings
        except CommandError as error:  # not there, or not to be read: the other files are looked at all the same
            findings.append(Finding(file, None, Problem("", str(error).removeprefix(f"{file}: "))))
            code = error.code
    found, remarks = validate_documents(documents, place=where.value)
    findings += found
    if output is not Format.TEXT:
        wire = {"valid": not findings, "problems": [finding.to_wire() for finding in findings], "remarks": remarks}
        print_document(wire, output)
    else:
        for remark in remarks:
            err().print(remark, style="dim")
        for finding in findings:
            err().print(str(finding))
        if not findings:
            names = [f"{d.kind} {d.body['metadata']['name']}" for d in documents if d.group == "plumbline.dev"]
            out().print(f"valid: {', '.join(names)}" if names else "nothing to check")
    if findings:
        raise typer.Exit(code or BAD_INPUT)
