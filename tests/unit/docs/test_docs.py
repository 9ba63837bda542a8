"""The documentation speaks of what there is: links, manifests, commands and reasons are compared with the code."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml
from plumbline_api.check import check
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.runtime import AlignmentRuntime

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for page in (ROOT / "docs").rglob("*.md")), *(ROOT / "examples").rglob("*.md")]
)
GROUP = "plumbline.dev/v1alpha1"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    found = set()
    for line in page.read_text().splitlines():
        if heading := re.match(r"#+ (.*)", line):
            text = re.sub(r"[^\w\- ]", "", heading[1].replace("`", "")).strip().lower()
            found.add(text.replace(" ", "-"))
    return found


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def blocks(page: Path, language: str) -> Iterator[str]:
    yield from re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{target} is not there"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_manifests_on_the_pages_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        for document in yaml.safe_load_all(block):
            if not isinstance(document, dict) or document.get("apiVersion") != GROUP:
                continue
            if document["kind"] == "AlignmentRuntime":
                AlignmentRuntime.parse(document)
            else:
                pipeline = AlignmentPipeline.parse(document)
                place = "local" if any("://" not in data.source for data in pipeline.spec.datasets) else "anywhere"
                assert check(pipeline, place=place) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_on_the_pages_exist(page: Path) -> None:
    from plumbline_cli.main import app

    group = typer.main.get_command(app)
    commands = group.commands  # type: ignore[attr-defined]
    text = page.read_text()
    for words in re.findall(r"(?:^|[`$] ?|kubectl )plumbline ([a-z]+)((?: +[^\s`|#]+)*)", text, flags=re.MULTILINE):
        command, rest = words
        if command not in commands:
            assert command in ("is", "turns", "charts"), f"there is no command plumbline {command}"
            continue
        known = {
            option for parameter in commands[command].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for option in re.findall(r"(?<= )--?[a-z][a-z-]*", rest):
            assert option in known, f"plumbline {command} has no option {option}"


def reasons_in_code() -> set[str]:
    """Every reason that a stage or a pipeline can show, as the sources write them."""
    found: set[str] = set()
    for folder in ("operator", "trainer_image"):
        for source in (ROOT / folder).rglob("*.py"):
            text = source.read_text()
            found |= set(re.findall(r'reason=f?"([A-Z][A-Za-z]+)"', text))
            found |= set(re.findall(r'\breason = "([A-Z][A-Za-z]+)"', text))
            found |= set(re.findall(r'"reason": "([A-Z][A-Za-z]+)"', text))
            found |= set(re.findall(r'Verdict\(\s*"\w+",\s*"([A-Za-z]+)"', text))
            found |= set(re.findall(r'\bfailure\("([A-Za-z]+)"', text))
            found |= set(re.findall(r'Wait\("([A-Za-z]+)"', text))
            found |= set(re.findall(r'_fail\([^"]*"([A-Za-z]+)"', text))
            found |= set(re.findall(r'_ended\([^"]*"Failed", "([A-Za-z]+)"', text))
    return found


WELL_KNOWN = {"Completed", "Cached", "DeadlineExceeded", "OOMKilled", "Error"}
"""Good ends, and words of Kubernetes that are translated before anybody sees them."""


def test_every_reason_is_explained() -> None:
    page = "".join((ROOT / "docs" / name).read_text() for name in ("troubleshooting.md", "runbooks.md"))
    explained = set(re.findall(r"`([A-Z][A-Za-z]+)`", page))
    assert reasons_in_code() - WELL_KNOWN <= explained


def test_finding_reasons_finds_some() -> None:
    assert {"InputMissing", "OutOfMemory", "NameConflict", "TooManyAttempts", "StorageDenied"} <= reasons_in_code()


def test_every_value_of_the_chart_that_the_pages_set_exists() -> None:
    values = yaml.safe_load((ROOT / "charts" / "plumbline" / "values.yaml").read_text())
    for page in PAGES:
        for path in re.findall(r"--set ([A-Za-z.]+)=", page.read_text()):
            part = values
            for key in path.split("."):
                assert isinstance(part, dict), f"{name_of(page)}: {path}"
                assert key in part or part == {}, f"{name_of(page)}: {path}"
                part = part.get(key, {})
