"""Options that several commands share, with one wording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plumbline_cli.output import Format

Output = Annotated[Format, typer.Option("--output", "-o", help="Print the result as text, json or yaml.")]
Storage = Annotated[
    Path | None,
    typer.Option("--storage", metavar="DIR", help="Folder with the results of local runs.", show_default=False),
]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", metavar="NAME", help="Namespace (of the current context, else default)."),
]
Context = Annotated[
    str | None, typer.Option("--context", metavar="NAME", help="Context of the kubeconfig (else the current one).")
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="FILE|NAME",
        help="A manifest file or a name with --storage: a local run. A name alone: a pipeline on the cluster.",
        show_default=False,
    ),
]
PipelineChoice = Annotated[
    str | None,
    typer.Option("--pipeline", metavar="NAME", help="Which pipeline, where the file holds several."),
]
