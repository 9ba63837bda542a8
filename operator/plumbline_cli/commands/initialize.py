"""`plumbline init`: a first pipeline to start from."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer

from plumbline_cli.commands.options import Output
from plumbline_cli.exits import BAD_INPUT, CommandError
from plumbline_cli.output import Format, out, print_document

MANIFEST = "pipeline.yaml"


def init(
    folder: Annotated[
        Path,
        typer.Argument(metavar="[FOLDER]", help="Folder to write to; made if it is not there.", show_default=False),
    ] = Path(),
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the pipeline.")] = "first-steps",
    output: Output = Format.TEXT,
) -> None:
    """Write a commented manifest and small data to start from. Files that are there already are never touched."""
    from plumbline_api.errors import ManifestError
    from plumbline_api.pipeline import AlignmentPipeline

    template = resources.files("plumbline_cli") / "templates" / "start"
    files = dict(_files(template))
    files[MANIFEST] = files[MANIFEST].replace("name: first-steps", f"name: {name}", 1)
    try:
        _check_name(AlignmentPipeline, files[MANIFEST])
    except ManifestError as error:
        raise CommandError("; ".join(str(problem) for problem in error.problems), BAD_INPUT) from None
    present = [path for path in files if (folder / path).exists()]
    if present:
        there = ", ".join(str(folder / path) for path in present)
        raise CommandError(
            f"nothing was written, because files are there already: {there}. "
            "Name another folder: plumbline init FOLDER",
            BAD_INPUT,
        )
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    manifest = folder / MANIFEST
    if output is not Format.TEXT:
        print_document({"manifest": str(manifest), "written": [str(folder / path) for path in files]}, output)
        return
    for path in files:
        out().print(f"wrote {folder / path}")
    out().print(f"\nnext:\n  plumbline validate {manifest}\n  plumbline plan {manifest}\n  plumbline run {manifest}")


def _check_name(kind: type, text: str) -> None:
    import yaml

    kind.parse(yaml.safe_load(text))  # type: ignore[attr-defined]


def _files(root: Traversable, prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for item in sorted(root.iterdir(), key=lambda entry: entry.name):
        if item.is_dir():
            found += _files(item, f"{prefix}{item.name}/")
        else:
            found.append((f"{prefix}{item.name}", item.read_text(encoding="utf-8")))
    return found
