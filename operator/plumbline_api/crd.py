"""CustomResourceDefinitions from the models: structural schema, CEL rules, printer columns."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from plumbline_api.base import API_GROUP, API_VERSION, NAME_PATTERN, PIPELINE_NAME_MAX
from plumbline_api.pipeline import AlignmentPipeline
from plumbline_api.runtime import AlignmentRuntime

SPEC_RULES: dict[str, list[dict[str, str]]] = {
    "AlignmentPipeline": [
        {
            "rule": "!has(self.datasets) || self.stages.all(s, !self.datasets.exists(d, d.name == s.name))",
            "message": "stages and datasets share one name space: a stage has the name of a dataset",
        },
        {
            "rule": "self.stages.all(s, !(s.name in ['preflight', 'finalize', 'collect']))",
            "message": "preflight, finalize and collect are names of built-in steps",
        },
        {
            "rule": "has(self.storage) == has(oldSelf.storage) && (!has(self.storage) || self.storage.uri == oldSelf.storage.uri)",
            "message": "storage.uri cannot be changed, because the results so far lie there; delete the pipeline and apply it anew",
        },
    ],
    "AlignmentRuntime": [],
}

COLUMNS: dict[str, list[dict[str, Any]]] = {
    "AlignmentPipeline": [
        {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
        {"name": "Stage", "type": "string", "jsonPath": ".status.stage"},
        {"name": "Progress", "type": "string", "jsonPath": ".status.progress"},
        {"name": "GPU-Hours", "type": "number", "jsonPath": ".status.usage.gpuHours"},
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
        {
            "name": "Message",
            "type": "string",
            "jsonPath": '.status.conditions[?(@.type=="Ready")].message',
            "priority": 1,
        },
        {"name": "Report", "type": "string", "jsonPath": ".status.report", "priority": 1},
    ],
    "AlignmentRuntime": [
        {"name": "Accelerator", "type": "string", "jsonPath": ".spec.accelerator.resourceName"},
        {"name": "Queue", "type": "string", "jsonPath": ".spec.queueName"},
        {"name": "Storage", "type": "string", "jsonPath": ".spec.storage.uri"},
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    ],
}


def pipeline_crd() -> dict[str, Any]:
    """The CRD of AlignmentPipeline."""
    return _crd(AlignmentPipeline, plural="alignmentpipelines", short="alp", scope="Namespaced", has_status=True)


def runtime_crd() -> dict[str, Any]:
    """The CRD of AlignmentRuntime."""
    return _crd(AlignmentRuntime, plural="alignmentruntimes", short="alr", scope="Cluster", has_status=False)


def all_crds() -> dict[str, dict[str, Any]]:
    """Every CRD by the name of its file."""
    return {f"{crd['metadata']['name'].split('.')[0]}.yaml": crd for crd in (pipeline_crd(), runtime_crd())}


def _crd(model: type[BaseModel], *, plural: str, short: str, scope: str, has_status: bool) -> dict[str, Any]:
    kind = model.__name__
    schema = structural_schema(model)
    properties = schema["properties"]
    name_rule = {"maxLength": PIPELINE_NAME_MAX, "pattern": NAME_PATTERN} if kind == "AlignmentPipeline" else {}
    properties["metadata"] = {"type": "object"}
    if name_rule:
        properties["metadata"]["properties"] = {"name": {"type": "string", **name_rule}}
    for plain in ("apiVersion", "kind"):
        properties[plain] = {"type": "string", "description": properties[plain]["description"]}
    schema["required"] = ["spec"]
    if SPEC_RULES[kind]:
        properties["spec"]["x-kubernetes-validations"] = SPEC_RULES[kind]
    version: dict[str, Any] = {
        "name": API_VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "additionalPrinterColumns": COLUMNS[kind],
    }
    if has_status:
        version["subresources"] = {"status": {}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{API_GROUP}", "labels": {"app.kubernetes.io/part-of": "plumbline"}},
        "spec": {
            "group": API_GROUP,
            "scope": scope,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short],
                "categories": ["align"],
            },
            "versions": [version],
        },
    }


def structural_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The model's schema in the dialect of the API server: no $ref, no titles, no unions with null.

    Defaults are named in descriptions instead of being set, so that the server stores what the user wrote.
    """
    raw = model.model_json_schema(by_alias=True)
    definitions = raw.pop("$defs", {})
    converted: dict[str, Any] = _convert(raw, definitions)
    return converted


def _convert(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    node = dict(node)
    if "$ref" in node:
        target = dict(definitions[node.pop("$ref").rsplit("/", 1)[-1]])
        own = node.pop("description", None)
        inner = target.pop("description", None)
        node = {**target, **node}
        if own or inner:
            node["description"] = _joined(own, inner)
        return _convert(node, definitions)
    if "anyOf" in node:
        options = [option for option in node.pop("anyOf") if option.get("type") != "null"]
        if len(options) != 1:
            raise TypeError(f"a union cannot be said in a structural schema: {options}")
        inner_description = options[0].get("description")
        return _convert({**options[0], **node, "description": node.get("description", inner_description)}, definitions)
    result: dict[str, Any] = {}
    if node.get("description"):
        result["description"] = node["description"] + _default_words(node)
    if "const" in node:
        result |= {"type": "string", "enum": [node["const"]]}
    if node.get("x-plumbline-quantity"):
        result |= {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": True,
            "pattern": node["pattern"],
            "maxLength": node["maxLength"],
        }
        return result
    for key in (
        "type",
        "enum",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "maxProperties",
    ):
        if key in node:
            result[key] = node[key]
    for bound, plain in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bound in node:
            result[plain], result[bound] = node[bound], True
    if "x-kubernetes-validations" in node:
        result["x-kubernetes-validations"] = node["x-kubernetes-validations"]
    if node.get("type") == "array":
        result["items"] = _convert(node["items"], definitions)
        if "x-plumbline-item-validations" in node:
            result["items"]["x-kubernetes-validations"] = node["x-plumbline-item-validations"]
        # Without a type a list is atomic, and the size is limited.
        if "x-plumbline-map-key" in node:
            result |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [node["x-plumbline-map-key"]]}
    if node.get("type") == "object":
        if "properties" in node:
            result["properties"] = {name: _convert(value, definitions) for name, value in node["properties"].items()}
            if node.get("required"):
                result["required"] = sorted(node["required"])
        elif isinstance(node.get("additionalProperties"), dict):
            result["additionalProperties"] = _convert(node["additionalProperties"], definitions)
    return result


def _joined(own: str | None, inner: str | None) -> str:
    """What the field says and what its type says, without saying it twice."""
    if own is None or inner is None or own == inner:
        return own or inner or ""
    if own.split()[:2] == inner.split()[:2]:
        return max(own, inner, key=len)
    return f"{own} {inner}"


def _default_words(node: dict[str, Any]) -> str:
    default = node.get("default")
    if default is None or isinstance(default, dict | list):
        return ""
    shown = str(default).lower() if isinstance(default, bool) else str(default)
    return f" Default: {shown}."
