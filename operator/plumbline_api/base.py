"""What every model of the contract shares: camelCase on the wire, unknown fields refused, one-of rules."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints
from pydantic.alias_generators import to_camel

API_GROUP = "plumbline.dev"
API_VERSION = "v1alpha1"
GROUP_VERSION = f"{API_GROUP}/{API_VERSION}"

PIPELINE_NAME_MAX = 40
STAGE_NAME_MAX = 30
STAGES_MAX = 64
EXTERNAL_INPUTS_MAX = 48

NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"

LABEL_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
DURATION_PATTERN = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$"
PATTERN_WORDS = {
    NAME_PATTERN: "small letters, digits and dashes, with a letter first and no dash at the end",
    LABEL_PATTERN: "small letters, digits and dashes, with no dash at either end",
    QUANTITY_PATTERN: "a quantity such as 500m, 4 or 16Gi",
    DURATION_PATTERN: "a duration such as 90s, 30m or 1h30m",
    r"^https?://": "a URL that begins with https:// or http://",
}
"""What a pattern asks for, in words."""

Name = Annotated[
    str,
    StringConstraints(pattern=NAME_PATTERN, min_length=1, max_length=STAGE_NAME_MAX),
]
"""Name of a stage or a dataset: they share one name space, because a reference is just a name."""

Uri = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Quantity = Annotated[
    str,
    StringConstraints(pattern=QUANTITY_PATTERN, max_length=32),
    Field(json_schema_extra={"x-plumbline-quantity": True}, coerce_numbers_to_str=True),
]
"""A Kubernetes resource quantity, such as `500m` or `16Gi`."""
Duration = Annotated[str, StringConstraints(pattern=DURATION_PATTERN, max_length=32)]
"""A metav1 duration, such as `90s` or `1h30m`."""


class Contract(BaseModel):
    """Base of every model: camelCase aliases, no unknown fields, values frozen once parsed."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="null",
        allow_inf_nan=False,
    )

    def to_wire(self) -> dict[str, Any]:
        """The JSON form with camelCase keys; fields that hold None are left out, as Kubernetes does."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class OneOf(Contract):
    """A value of which exactly one field is set, as a Pod volume has one source."""

    one_of_noun: ClassVar[str] = "field"

    @property
    def choice(self) -> str:
        """The wire name of the field that is set."""
        return str(next(self._set_names()))

    @property
    def value(self) -> Any:
        """The value of the field that is set."""
        return next(getattr(self, name) for name in type(self).one_of_fields() if getattr(self, name) is not None)

    @classmethod
    def one_of_fields(cls) -> tuple[str, ...]:
        """The python names of the alternatives: every field that is not declared common."""
        return tuple(name for name in cls.model_fields if name not in cls.common_fields())

    @classmethod
    def common_fields(cls) -> frozenset[str]:
        """The python names of fields that stand beside the alternatives."""
        return frozenset()

    def _set_names(self) -> Any:
        for name in type(self).one_of_fields():
            if getattr(self, name) is not None:
                yield type(self).model_fields[name].alias or name

    def model_post_init(self, _context: Any) -> None:
        """Refuse none or several alternatives."""
        chosen = list(self._set_names())
        if len(chosen) != 1:
            names = ", ".join(type(self).model_fields[n].alias or n for n in type(self).one_of_fields())
            found = "none is" if not chosen else f"{' and '.join(chosen)} are"
            raise ValueError(f"exactly one {self.one_of_noun} must be set, {found}; choose one of: {names}")


def one_of_rule(model: type[OneOf]) -> dict[str, JsonValue]:
    """The CEL rule that says the same as `OneOf` does, for the CRD."""
    aliases = [model.model_fields[n].alias or n for n in model.one_of_fields()]
    terms = ", ".join(f"has(self.{alias})" for alias in aliases)
    return {
        "rule": f"[{terms}].filter(x, x).size() == 1",
        "message": f"exactly one {model.one_of_noun} must be set: {', '.join(aliases)}",
    }
