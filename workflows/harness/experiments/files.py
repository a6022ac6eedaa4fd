"""Files that users write, in YAML: each is held against a pydantic model, and one line says what is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticCustomError

from fastserve.core.errors import ConfigError

T = TypeVar("T")
M = TypeVar("M", bound="Keys")


class Keys(BaseModel):
    """Keys with values of exactly their types: 1 is not a text, and "1" is not a number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, given: Any) -> Any:
        """Refuse an unknown key first, and suggest the one that may be meant."""
        for key in given if isinstance(given, Mapping) else ():
            if key not in cls.model_fields:
                known = list(cls.model_fields)
                meant = difflib.get_close_matches(str(key), known, 1)
                hint = f"did you mean {meant[0]!r}?" if meant else f"valid keys: {', '.join(known)}"
                raise PydanticCustomError("unknown_key", "{text}", {"text": f"unknown key {key!r}; {hint}"})
        return given


def rule(text: str) -> WrapValidator:
    """Say `text` of a value that is refused, and keep any other as it is written: 1 stays 1, not 1.0."""

    def check(value: Any, validate: Any) -> Any:
        try:
            validate(value)
        except ValidationError:
            raise PydanticCustomError("rule", "{text}", {"text": text}) from None
        return value

    return WrapValidator(check)


if TYPE_CHECKING:
    Omittable: TypeAlias = T | None
else:
    Omittable = Annotated[T, "may be left out"]
"""A key that may be left out but not be null. Its default is None, which pydantic does not check."""

Number = Annotated[float, rule("must be a number")]
Positive = Annotated[float, Field(gt=0), rule("must be a number above 0")]
Share = Annotated[float, Field(ge=0, le=1), rule("must be a number from 0 to 1")]
Count = Annotated[int, Field(ge=1), rule("must be a whole number of at least 1")]
Text = Annotated[str, Field(min_length=1), rule("must be a text of at least one character")]
NumberOrText = Annotated[int | float | str, rule("must be a number or a text")]
Slug = Annotated[
    str,
    Field(pattern=r"^[a-z0-9]+([.-][a-z0-9]+)*$"),
    rule("must be a name of small letters and digits, with single dots or hyphens between them"),
]
Several = Annotated[tuple[T, ...], Field(min_length=1, strict=False)]
"""A list of at least one."""
Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    Field(min_length=1, strict=False, json_schema_extra={"uniqueItems": True}),
]


def check_differ(values: Sequence[Any], what: str) -> None:
    """Raise ValueError if a value is there twice; `what` names the values."""
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"{what} must differ, {value!r} is there twice")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return what a YAML file holds. Raises ConfigError if it cannot be read or holds no keys with values."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys with values, as in workflows/config; it holds {content!r:.60}")
    return content


def parse_as(model: type[M], content: Any, source: Path | str) -> M:
    """Return `content` as the model. Raises ConfigError: one line with source, key, value, and what would be right."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first, *others = (
            each for each in error.errors(include_url=False) if each["type"] != "default_factory_not_called"
        )
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(f"{source}: {_explained(first, content)}{more}") from None


def json_schema(model: type[Keys]) -> dict[str, Any]:
    """Return the JSON schema of a file, with the docstrings of the keys as descriptions."""
    return {"$schema": _Schema.schema_dialect} | model.model_json_schema(schema_generator=_Schema)


class _Schema(GenerateJsonSchema):
    def default_schema(self, schema: Any) -> dict[str, Any]:
        """A default of None means that the key may be left out. It is not a value."""
        described = super().default_schema(schema)
        return {key: value for key, value in described.items() if key != "default" or value is not None}

    def field_title_should_be_set(self, schema: Any) -> bool:
        """A key needs no title: it has a name and a description."""
        return False


_RULES = {
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "tuple_type": "must be a list",
    "model_type": "must hold keys with values",
    "model_attributes_type": "must hold keys with values",
    "dict_type": "must hold keys with values",
    "too_short": "must not be empty",
}
"""Pydantic's errors in the words of a reader of YAML."""


def _explained(error: Any, content: Any) -> str:
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    where = _place(error["loc"], content, is_missing=kind == "missing")
    if kind == "missing":
        return f"{where} is missing"
    if kind in ("unknown_key", "value_error"):
        text = context["text"] if kind == "unknown_key" else context["error"]
        return f"{where}: {text}" if where else str(text)
    if kind.startswith("union_tag"):
        key = context["discriminator"].strip("'")
        where, value = f"{where}.{key}", value.get(key)
        if kind == "union_tag_not_found":
            return f"{where} is missing"
        text = f"must be one of {context['expected_tags']}"
    elif kind == "literal_error":
        text = f"must be one of {context['expected']}"
    elif kind == "greater_than_equal":
        text = f"must be at least {context['ge']}"
    else:
        text = _RULES.get(kind) or error["msg"]
    return f"{where} {text}, not {value!r:.60}"


def _place(path: Sequence[str | int], content: Any, is_missing: bool) -> str:
    """Name the place, such as `series 'vllm': run.rate`. Parts of lists go by their names, else by number from 1."""
    place, keys = "", ""
    for i, step in enumerate(path):
        if isinstance(step, int) and isinstance(content, Sequence):
            content = content[step]
            names = content if isinstance(content, Mapping) else {}
            name = names.get("name", names.get("id", names.get("claim")))
            place, keys = f"{place}{keys} {step + 1 if name is None else repr(name)}: ", ""
        elif isinstance(content, Mapping) and (step in content or (is_missing and i == len(path) - 1)):
            keys += f".{step}" if keys else str(step)
            content = content.get(step)
        # Else a step of pydantic's own, such as the kind of a union.
    return (place + keys).removesuffix(": ")
