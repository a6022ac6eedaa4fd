"""Parts that the requests share: an object of a request, its unsupported fields, texts and token ids.

There are three kinds of field. Fields of a model are supported. Fields of a `NEUTRAL` table are known and unsupported:
they are refused unless their value changes nothing. All other fields are ignored, since clients add their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from fastserve.server.http.errors import shown

INT64 = 2**63 - 1
INT32 = 2**31 - 1

Neutral = Mapping[str, tuple[Any, ...]]
"""Known, unsupported fields, each with the values, beside null, that change nothing."""


def field_error(name: str, reason: str) -> PydanticCustomError:
    """Return the error that a validator of a whole object raises for its field `name`."""
    return PydanticCustomError("field", "{reason}", {"field": name, "reason": reason})


class Body(BaseModel):
    """An object of a request. A field that is null counts as left out; fields of `NEUTRAL` must be neutral."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True)
    NEUTRAL: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        given = {name: value for name, value in body.items() if value is not None}
        for name in cls.NEUTRAL.keys() & given.keys():
            neutral = cls.NEUTRAL[name]
            if given[name] not in neutral:
                instead = "leave it out" + "".join(f" or send {json.dumps(value)}" for value in neutral)
                raise field_error(name, f"{shown(given[name])} is not supported by this server; {instead}")
        return given


# -- fields that take values of several kinds -------------------------------------------------------------------------


def kind_of(**kinds: Callable[[Any], bool]) -> Callable[[Any], str | None]:
    """Return a function that names the kind of a value, such as `<text>`; it looks at no more than one element."""
    return lambda value: next((f"<{name}>" for name, is_kind in kinds.items() if is_kind(value)), None)


def is_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def is_list(value: Any) -> bool:
    """Whether a value is a list."""
    return isinstance(value, list)


def is_list_of(kind: type) -> Callable[[Any], bool]:
    """Return a function that says whether a value is a list whose first element is a `kind`."""
    return lambda value: isinstance(value, list) and bool(value) and isinstance(value[0], kind)


# -- values -----------------------------------------------------------------------------------------------------------


def encodable(text: str) -> str:
    """Return `text`. Raises ValueError if it has no encoding in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a lone surrogate at character {error.start}, which no text has") from error
    return text


Text = Annotated[str, AfterValidator(encodable)]
TokenId = Annotated[int, Field(ge=0, le=INT32)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
