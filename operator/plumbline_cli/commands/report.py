"""`plumbline report`: where the report lies, and the figures that decide."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from plumbline_cli.commands.options import Context, Namespace, Output, PipelineChoice, Storage, Target
from plumbline_cli.commands.targets import ClusterTarget, LocalTarget, find_target
from plumbline_cli.exits import BAD_INPUT, NOT_FOUND, CommandError
from plumbline_cli.output import Format, out, print_document


def report(
    target: Target,
    open_: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Copy the report to a file of this machine.")
    ] = None,
    storage: Storage = None,
    namespace: Namespace = None,
    context: Context = None,
    pipeline: PipelineChoice = None,
    output: Output = Format.TEXT,
) -> None:
    """Show the report of a run: where it lies, and its table of figures."""
    found = find_target(target, storage=storage, namespace=namespace, context=context, pipeline=pipeline)
    if isinstance(found, LocalTarget):
        _report_local(found, open_=open_, save=save, output=output)
    else:
        _report_cluster(found, open_=open_, save=save, output=output)


def _report_local(target: LocalTarget, *, open_: bool, save: Path | None, output: Format) -> None:
    import shutil
    import webbrowser

    from plumbline_cli.display.ending import print_figures
    from plumbline_cli.local.results import find_report, read_summary

    path = find_report(target.state)
    if path is None:
        raise CommandError(
            f"{target.folder.name} has no report: it is {target.state.status.phase}; one is written when a run ends",
            NOT_FOUND,
        )
    if save is not None:
        try:
            shutil.copyfile(path, save)
        except OSError as error:
            raise CommandError(f"--save {save}: {error.strerror}", BAD_INPUT) from None
    summary = read_summary(target.folder)
    if output is not Format.TEXT:
        print_document({"report": str(path), "summary": summary}, output)
    else:
        out().print(str(path), soft_wrap=True)
        if summary is not None:
            print_figures(out(), summary)
    if open_:
        webbrowser.open(path.as_uri())


def _report_cluster(target: ClusterTarget, *, open_: bool, save: Path | None, output: Format) -> None:
    import webbrowser

    body = target.read()
    uri = (body.get("status") or {}).get("report")
    if not uri:
        phase = (body.get("status") or {}).get("phase", "Pending")
        raise CommandError(f"{target.name} has no report yet: it is {phase}; one is written when a run ends", NOT_FOUND)
    if save is not None or open_:
        path = save or Path(f"{target.name}-report.html")
        _download(uri, _storage_of(target, body), path)
        if open_:
            webbrowser.open(path.absolute().as_uri())
    if output is Format.TEXT:
        out().print(uri if save is None else f"{uri} saved as {save}", soft_wrap=True)
    else:
        print_document({"report": uri}, output)


def _storage_of(target: ClusterTarget, body: dict[str, Any]) -> dict[str, Any]:
    """Endpoint and region of a run's storage: the pipeline's own, else its runtime's, else what this shell says."""
    own = (body.get("spec") or {}).get("storage")
    if own:
        return dict(own)
    runtime = (body.get("status") or {}).get("runtime")
    return (target.cluster.runtime_storage(runtime) if runtime else None) or {}


def _download(uri: str, storage: dict[str, Any], path: Path) -> None:
    """Copy an object of S3 with the caller's own credentials."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        raise CommandError(
            f"downloading needs boto3: pip install boto3, or copy {uri} with another S3 client", NOT_FOUND
        ) from None
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=storage.get("endpoint"), region_name=storage.get("region"))
    try:
        client.download_file(bucket, key, str(path))
    except (BotoCoreError, ClientError) as error:
        raise CommandError(
            f"{uri} cannot be read from {client.meta.endpoint_url} with the credentials of this shell "
            f"(AWS_ACCESS_KEY_ID, …; another endpoint: AWS_ENDPOINT_URL): {error}",
            NOT_FOUND,
        ) from None
