"""Everything made from the models is in step with them and fits the API server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
from plumbline_api.crd import all_crds
from plumbline_api.generate import generated_files, stale_files
from plumbline_api.stages import STAGE_TYPES, Stage

CRD_MAX_BYTES = 240 * 1024
"""`kubectl apply` keeps the whole object in an annotation, and annotations may take 256 KiB together."""


def test_generated_files_are_in_step() -> None:
    assert stale_files() == [], "run `make gen`"


@pytest.mark.parametrize("name", all_crds())
def test_crds_are_valid_and_small(name: str) -> None:
    kubernetes_validate.validate(all_crds()[name], "1.34", strict=True)
    assert len(generated_files()[f"crds/{name}"].encode()) < CRD_MAX_BYTES


@pytest.mark.parametrize("name", all_crds())
def test_every_field_has_a_description(name: str) -> None:
    schema = all_crds()[name]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    bare = [path for path, node in _fields("", schema) if not node.get("description")]
    assert [path for path in bare if not path.startswith(".metadata")] == []


@pytest.mark.parametrize("name", all_crds())
def test_every_list_and_string_with_rules_is_bounded(name: str) -> None:
    """CEL's cost is estimated from the bounds; without them the API server refuses the CRD."""
    schema = all_crds()[name]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    unbounded = [
        path for path, node in _fields("spec", schema) if node.get("type") == "array" and "maxItems" not in node
    ]
    assert unbounded == []


def test_every_stage_type_is_known_to_the_checker() -> None:
    aliases = {Stage.model_fields[n].alias or n for n in Stage.one_of_fields()}
    assert aliases == set(STAGE_TYPES)


def _fields(path: str, node: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, child in node.get("properties", {}).items():
        yield f"{path}.{name}", child
        yield from _fields(f"{path}.{name}", child)
    if "items" in node:
        yield from _fields(f"{path}[]", node["items"])
