"""Manifest files: YAML documents that know on which line each field stands."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from plumbline_api.base import API_GROUP, GROUP_VERSION
from plumbline_api.check import Place, check
from plumbline_api.errors import ManifestError, Problem
from plumbline_api.names import ANNOTATION_DEFAULT_RUNTIME
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.runtime import AlignmentRuntime, RewardEndpoint

from plumbline_cli.exits import BAD_INPUT, NOT_FOUND, CommandError

STDIN = "-"
KINDS = ("AlignmentPipeline", "AlignmentRuntime")
FILE_BYTES_MAX = 3 * 2**20
"""More than the API server takes; a larger file is something else, a dataset most likely."""
METADATA_FIELDS = (
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "labels",
    "managedFields",
    "name",
    "namespace",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
)
"""Fields of an object's metadata; kubectl refuses others."""


class _Loader(yaml.SafeLoader):
    """Reads scalars as the API server's YAML parser does: 1e-4 is a number, a date is text, a key stands once."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem with the place in a file where it stands."""

    file: str
    line: int | None
    problem: Problem

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.problem}"

    def to_wire(self) -> dict[str, Any]:
        """The JSON form."""
        wire: dict[str, Any] = {"file": self.file, "path": self.problem.path, "message": self.problem.message}
        return wire if self.line is None else {**wire, "line": self.line}


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document of a file."""

    file: str
    body: Any
    node: yaml.Node = field(repr=False)

    @property
    def kind(self) -> str | None:
        """The object's kind, where it says one."""
        kind = self.body.get("kind") if isinstance(self.body, dict) else None
        return kind if isinstance(kind, str) else None

    @property
    def group(self) -> str | None:
        """The API group of the object, where it says one."""
        version = self.body.get("apiVersion") if isinstance(self.body, dict) else None
        return version.partition("/")[0] if isinstance(version, str) else None

    def line_of(self, path: str) -> int:
        """The line (counted from 1) of a field such as `spec.stages[1].sft`, or of its nearest parent that is there."""
        node, line = self.node, self.node.start_mark.line
        for part in _path_parts(path):
            step = _child(node, part)
            if step is None:
                break
            line, node = step
        return line + 1

    def locate(self, problems: Iterable[Problem]) -> list[Finding]:
        """The problems with their lines, in the order of the file."""
        found = [Finding(self.file, self.line_of(problem.path), problem) for problem in problems]
        return sorted(found, key=lambda finding: (finding.line or 0, finding.problem))


class InvalidManifestError(CommandError):
    """Manifests with problems; the message lists every one of them."""

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings
        super().__init__("\n".join(str(finding) for finding in findings), BAD_INPUT)


def read_documents(file: str) -> list[Document]:
    """The documents of a YAML or JSON file, empty ones left out.

    Raises:
        CommandError: if the file is not there or cannot be read.
        InvalidManifestError: if it is empty, is not YAML, or a key stands twice.
    """
    text = _read_text(file)
    documents: list[Document] = []
    try:
        loader = _Loader(text)
        try:
            while loader.check_node():
                node = loader.get_node()
                assert node is not None
                if repeated := [Finding(file, line, problem) for line, problem in _repeated_keys(node, set())]:
                    raise InvalidManifestError(repeated)
                body = loader.construct_document(node)
                if body is not None:
                    documents.append(Document(file, body, node))
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise InvalidManifestError([_syntax_finding(file, error)]) from None
    except RecursionError:
        raise InvalidManifestError([Finding(file, None, Problem("", "nested too deeply for a manifest"))]) from None
    if not documents:
        message = "the file is empty; `plumbline init FOLDER` writes a manifest to start from"
        raise InvalidManifestError([Finding(file, None, Problem("", message))])
    return documents


def _read_text(file: str) -> str:
    try:
        if file == STDIN:
            return sys.stdin.read()
        path = Path(file)
        if (size := path.stat().st_size) > FILE_BYTES_MAX:
            message = f"a manifest has at most 3 MiB, this file has {size / 2**20:,.0f} MiB; is it a dataset?"
            raise InvalidManifestError([Finding(file, None, Problem("", message))])
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CommandError(f"{file}: there is no such file", NOT_FOUND) from None
    except IsADirectoryError:
        raise CommandError(f"{file}: this is a folder; name the manifest file in it", BAD_INPUT) from None
    except UnicodeDecodeError as error:
        message = f"not UTF-8 text (byte {error.start}); a manifest is a YAML file"
        raise InvalidManifestError([Finding(file, None, Problem("", message))]) from None
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}", NOT_FOUND) from None


def parse_pipeline(document: Document) -> AlignmentPipeline:
    """The pipeline of a document.

    Raises:
        InvalidManifestError: with every problem found.
    """
    problems = _object_problems(document)
    try:
        pipeline = AlignmentPipeline.parse(document.body)
    except ManifestError as error:
        raise InvalidManifestError(document.locate([*problems, *error.problems])) from None
    if problems:
        raise InvalidManifestError(document.locate(problems))
    return pipeline


def read_pipeline_document(file: str, name: str | None = None) -> Document:
    """The one pipeline document of a file, or the one of a name.

    Raises:
        CommandError: if there is none, or several and no name was given.
        InvalidManifestError: if the file is not YAML.
    """
    return _choose_pipeline(file, read_documents(file), name)


def read_local_documents(file: str, name: str | None = None) -> tuple[Document, tuple[RewardEndpoint, ...]]:
    """The pipeline document as `read_pipeline_document` finds it, and the reward endpoints that its file offers it.

    Raises:
        CommandError: if there is no pipeline, or several and no name was given.
        InvalidManifestError: if the file is not YAML, or a runtime in it does not hold.
    """
    documents = read_documents(file)
    chosen = _choose_pipeline(file, documents, name)
    runtimes: list[AlignmentRuntime] = []
    for document in documents:
        if document.kind == "AlignmentRuntime":
            try:
                runtimes.append(AlignmentRuntime.parse(document.body))
            except ManifestError as error:
                raise InvalidManifestError(document.locate(error.problems)) from None
    spec = chosen.body.get("spec")
    reference = spec.get("runtimeRef") if isinstance(spec, dict) else None
    return chosen, _local_endpoints(reference.get("name") if isinstance(reference, dict) else None, runtimes)


def _local_endpoints(wanted: str | None, runtimes: list[AlignmentRuntime]) -> tuple[RewardEndpoint, ...]:
    """Reward endpoints of the runtime that a pipeline names; where it names none, of the only one of the file."""
    if wanted is None and len(runtimes) != 1:
        runtimes = [
            runtime for runtime in runtimes if runtime.metadata.annotations.get(ANNOTATION_DEFAULT_RUNTIME) == "true"
        ]
    fits = [runtime for runtime in runtimes if wanted in (None, runtime.metadata.name)]
    return tuple(fits[0].spec.reward_endpoints) if fits else ()


def _choose_pipeline(file: str, documents: list[Document], name: str | None) -> Document:
    pipelines = [document for document in documents if document.kind == "AlignmentPipeline"]
    if name is not None:
        pipelines = [document for document in pipelines if _name_of(document) == name]
    if len(pipelines) == 1:
        return pipelines[0]
    if pipelines:
        if repeated := _repeated_objects(pipelines):
            raise InvalidManifestError(repeated)
        names = ", ".join(str(_name_of(document)) for document in pipelines)
        raise CommandError(f"{file}: holds {len(pipelines)} pipelines ({names}); choose one with --pipeline NAME")
    if name is not None:
        raise CommandError(f"{file}: holds no AlignmentPipeline named {name}", NOT_FOUND)
    if len(documents) == 1 and documents[0].kind not in KINDS:
        raise InvalidManifestError(_unknown_kind(documents[0]))
    kinds = ", ".join(document.kind or "a document without a kind" for document in documents) or "nothing"
    raise CommandError(f"{file}: holds no AlignmentPipeline, but {kinds}")


def validate_documents(documents: list[Document], *, place: Place) -> tuple[list[Finding], list[str]]:
    """Every problem of some documents, and remarks about those that are not ours to check.

    A pipeline is checked against its runtime where that stands among the documents too.
    """
    findings = _repeated_objects(documents)
    remarks: list[str] = []
    runtimes: list[AlignmentRuntime] = []
    pipelines: list[tuple[Document, AlignmentPipeline]] = []
    for document in documents:
        if document.kind not in KINDS and document.group not in (None, API_GROUP):
            remarks.append(f"{document.file}: {document.kind or 'a document'} of another API is not checked")
            continue
        if document.kind not in KINDS:
            findings += _unknown_kind(document)
            continue
        findings += document.locate(_object_problems(document))
        try:
            if document.kind == "AlignmentRuntime":
                runtimes.append(AlignmentRuntime.parse(document.body))
            else:
                pipelines.append((document, AlignmentPipeline.parse(document.body)))
        except ManifestError as error:
            findings += document.locate(error.problems)
    for document, pipeline in pipelines:
        reference = pipeline.spec.runtime_ref
        endpoints = _local_endpoints(None if reference is None else reference.name, runtimes)
        runtime = _runtime_for(pipeline, runtimes)
        findings += document.locate(check(pipeline, runtime, place=place, local_endpoints=endpoints))
    return findings, remarks


def _runtime_for(pipeline: AlignmentPipeline, runtimes: list[AlignmentRuntime]) -> AlignmentRuntime | None:
    if pipeline.spec.runtime_ref is None:
        return None
    wanted = pipeline.spec.runtime_ref.name
    return next((runtime for runtime in runtimes if runtime.metadata.name == wanted), None)


def _object_problems(document: Document) -> list[Problem]:
    """What kubectl would refuse, although the models do not look at it."""
    problems = []
    if "apiVersion" not in document.body:
        problems.append(Problem("apiVersion", f"required, but not set; write {GROUP_VERSION}"))
    metadata = document.body.get("metadata")
    for key in metadata if isinstance(metadata, dict) else ():
        if key not in METADATA_FIELDS:
            close = difflib.get_close_matches(str(key), METADATA_FIELDS, n=1)
            hint = f"Did you mean {close[0]}?" if close else "Notes of your own go into labels or annotations"
            problems.append(Problem(f"metadata.{key}", f"unknown field. {hint}"))
    return problems


def _repeated_objects(documents: list[Document]) -> list[Finding]:
    """Objects of the same kind and name: of these kubectl would keep the last."""
    first: dict[tuple[Any, ...], Document] = {}
    findings: list[Finding] = []
    for document in documents:
        if document.kind not in KINDS or not isinstance(name := _name_of(document), str):
            continue
        earlier = first.setdefault((document.kind, document.body["metadata"].get("namespace"), name), document)
        if earlier is not document:
            where = f"{earlier.file}:{earlier.line_of('metadata.name')}"
            message = f'"{name}" stands twice, first in {where}; choose another name for one of them'
            findings += document.locate([Problem("metadata.name", message)])
    return findings


def _unknown_kind(document: Document) -> list[Finding]:
    if not isinstance(document.body, dict):
        message = f"a manifest is a mapping (apiVersion, kind, metadata, spec), this is {_noun(document.body)}"
        return document.locate([Problem("", message)])
    if document.kind is None:
        return document.locate([Problem("kind", f"required, but not set. Kinds: {', '.join(KINDS)}")])
    close = difflib.get_close_matches(document.kind, KINDS, n=1)
    hint = f". Did you mean {close[0]}?" if close else ""
    return document.locate([Problem("kind", f'"{document.kind}" is not one of {", ".join(KINDS)}{hint}')])


def _noun(value: Any) -> str:
    return "a list" if isinstance(value, list) else "text" if isinstance(value, str) else f'"{value}"'


def _name_of(document: Document) -> Any:
    metadata = document.body.get("metadata")
    return metadata.get("name") if isinstance(metadata, dict) else None


def _path_parts(path: str) -> Iterator[str | int]:
    for part in re.findall(r"\[(\d+)\]|([^.\[\]]+)", path):
        yield int(part[0]) if part[0] else part[1]


def _child(node: yaml.Node, part: str | int) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        item = node.value[part]
        return item.start_mark.line, item
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == str(part):
                return key.start_mark.line, value
    return None


def _repeated_keys(node: yaml.Node, seen: set[int], path: str = "") -> Iterator[tuple[int, Problem]]:
    if id(node) in seen:  # an alias of what has been looked at
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated_keys(item, seen, f"{path}[{index}]")
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            here = f"{path}.{key.value}" if path else str(key.value)
            line = key.start_mark.line + 1
            if key.value in first and key.value != "<<":
                message = f"stands twice, first on line {first[key.value]}; keep one of them"
                yield line, Problem(here, message)
            first.setdefault(key.value, line)
            yield from _repeated_keys(value, seen, here)


def _syntax_finding(file: str, error: yaml.YAMLError) -> Finding:
    if not isinstance(error, yaml.MarkedYAMLError):
        return Finding(file, None, Problem("", f"not YAML: {' '.join(str(error).split())}"))
    mark = error.problem_mark or error.context_mark
    words = " ".join(part for part in (error.context, error.problem) if part)
    if error.context_mark is not None and mark is not None and error.context_mark.line != mark.line:
        words = f"{error.context} (begun on line {error.context_mark.line + 1}) {error.problem}"
    remedy = ""
    if "'\\t'" in words:
        remedy = ". Indent with spaces, not with tabs"
    elif "mapping values are not allowed" in words:
        remedy = ". A colon in a value needs quotes around the value; or the indentation is wrong"
    elif "block" in words:
        remedy = ". Check the indentation of this line and of the one before"
    elif "quoted scalar" in words or "end of stream" in words:
        remedy = ". A quote or a bracket is not closed"
    column = "" if mark is None else f" (column {mark.column + 1})"
    return Finding(file, None if mark is None else mark.line + 1, Problem("", f"not YAML: {words}{column}{remedy}"))
