"""A request's body, bounded before it is read and again before it is parsed.

Parsing is one call into C that holds up every other thread, and a small body can become large objects: 2 MiB of `[1],`
become half a million lists. So the body's parts are counted first, which takes a few milliseconds.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from fastapi import Request

from fastserve.server.http.errors import APIError, bad_request, shown
from fastserve.server.http.offload import Offload

_MIB = 2**20
_BYTES_A_TOKEN = 32
"""A token is about 4 characters of text, each up to 6 bytes of JSON, or 7 bytes as an id."""
_MIN_BYTES = 2 * _MIB
_MAX_BYTES = 8 * _MIB
"""Enough for longer contexts, too: a million tokens of English are 4 MiB."""
_MIN_VALUES = 2**18
_SPARE_VALUES = 2**13
"""Values beside the prompt's."""
_MAX_STRINGS = 2**16
_MAX_CONTAINERS = 2**14
_MAX_FRACTIONS = 2**12
_MAX_DIGITS = 100
_MAX_NAME_CHARACTERS = 100
"""Of a field's name in an error."""
_FREE_BYTES = 65_536
"""First bytes of a body that do not count towards `_MAX_HELD_BYTES`: a connection buffers as many in any case."""
_MAX_HELD_BYTES = 4 * _MAX_BYTES
"""Bytes of all bodies at a time."""

_PARSE_S_A_BYTE = 6e-8
_TEXTS = re.compile(rb'"[^"]*"')


@dataclass(frozen=True)
class BodyLimits:
    """Bounds of one body."""

    num_bytes: int
    num_values: int
    """Numbers, texts, lists and objects in it; also prompt tokens in all."""

    @classmethod
    def of_context(cls, num_tokens: int) -> BodyLimits:
        """Return bounds that fit a request of `num_tokens` tokens, and many shorter prompts at once."""
        num_bytes = min(max(_MIN_BYTES, num_tokens * _BYTES_A_TOKEN), _MAX_BYTES)
        return cls(num_bytes, max(_MIN_VALUES, num_tokens))


class Bodies:
    """The bodies that are being read, parsed or tokenized: bounded each and all together."""

    def __init__(self, limits: BodyLimits, offload: Offload) -> None:
        self.limits = limits
        self._offload = offload
        self._num_bytes_held = 0

    async def read(self, http: Request) -> bytes:
        """Return the bytes of a body. Raises APIError 413 if they are too many, 503 if those of all requests are."""
        declared = http.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and len(declared) < 20:
            self._require_small(int(declared))
        chunks: list[bytes] = []
        size = 0
        async for chunk in http.stream():
            chunks.append(chunk)
            size += len(chunk)
            self._require_small(size)
            self._hold(http, max(0, size - _FREE_BYTES))
        return b"".join(chunks)

    async def parse(self, body: bytes, convert: Callable[[Any], Any]) -> Any:
        """Return what `convert` makes of a body's value. Raises what `parse` and `convert` raise."""
        return await self._offload.run(len(body) * _PARSE_S_A_BYTE, lambda: convert(parse(body, self.limits)))

    def release(self, http: Request) -> None:
        """Count the request's body no longer."""
        self._hold(http, 0)

    def _require_small(self, size: int) -> None:
        if size > self.limits.num_bytes:
            raise APIError(
                413,
                f"the body is larger than {self.limits.num_bytes} bytes, which is enough for the model's context; "
                "shorten the request, or send its prompts one by one",
            )

    def _hold(self, http: Request, size: int) -> None:
        held = getattr(http.state, "num_body_bytes_held", 0)
        if size > held and self._num_bytes_held + size - held > _MAX_HELD_BYTES:
            raise APIError(
                503,
                f"the bodies of other requests fill the {_MAX_HELD_BYTES // _MIB} MiB that the server has for them; "
                "try again in 1 s",
                code="bodies_full",
                headers={"retry-after": "1"},
            )
        self._num_bytes_held += size - held
        http.state.num_body_bytes_held = size


class BoundedRequest(Request):
    """A request whose body is read, parsed and validated within bounds.

    FastAPI keeps what `body` and `json` return until the request is answered. To save memory `body` returns one byte,
    and `json` the validated object, without ignored fields.
    """

    def __init__(self, http: Request, convert: Callable[[Any], Any]) -> None:
        """`convert`: turns a value of JSON into the validated object."""
        super().__init__(http.scope, http.receive)
        self._convert = convert
        self._whole = b""

    async def body(self) -> bytes:
        """Read the body and return its first byte, if there is one. Raises what `Bodies.read` raises."""
        self._whole = await self.app.state.bodies.read(self)
        return self._whole[:1]

    async def json(self) -> Any:
        """Return the validated object. Raises what `Bodies.parse` raises."""
        encoding = self.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise bad_request(f"Content-Encoding {shown(encoding)} is not supported; send the body uncompressed")
        whole, self._whole = self._whole, b""
        return await self.app.state.bodies.parse(whole, self._convert)


def parse(body: bytes, limits: BodyLimits) -> Any:
    """Return the value of a body in JSON and UTF-8. Raises APIError 400 if it is invalid or not within `limits`.

    No step holds up other threads for long: what one call into C works on was counted before.
    """
    _require_few(body, limits)
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: byte 0x{body[error.start]:02x} at {error.start}") from None
    num_fractions = 0

    def fraction(digits: str) -> float:
        nonlocal num_fractions
        num_fractions += 1
        if num_fractions > _MAX_FRACTIONS:
            _refuse("fractions", _MAX_FRACTIONS)
        return float(digits)

    try:
        return json.loads(text, object_pairs_hook=_object, parse_float=fraction, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise bad_request("the body is not a request: its lists and objects are nested too deeply") from None


def _require_few(body: bytes, limits: BodyLimits) -> None:
    # Every quote within a text has a backslash before it; so may a closing quote, but no opening one.
    num_strings = (body.count(b'"') - body.count(b'\\"')) // 2
    if num_strings > _MAX_STRINGS:
        _refuse("texts", _MAX_STRINGS)
    max_values = limits.num_values + _SPARE_VALUES
    if _num_containers(body) > _MAX_CONTAINERS or body.count(b",") > max_values:
        # Some of them may be inside texts. There are few texts by now, so removing them is cheap.
        body = _TEXTS.sub(b"", body.replace(rb"\\", b"").replace(rb"\"", b""))
        if _num_containers(body) > _MAX_CONTAINERS:
            _refuse("lists and objects", _MAX_CONTAINERS)
        if body.count(b",") > max_values:
            _refuse("values", max_values)


def _num_containers(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


def _refuse(what: str, most: int) -> NoReturn:
    raise bad_request(f"the body has more than {most} {what}; send less in one request")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise bad_request(f"the body has the field {shown(twice)} twice; send it once", twice[:_MAX_NAME_CHARACTERS])
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise bad_request(f"the body has a number of {len(digits)} digits; no field needs more than {_MAX_DIGITS}")
    return int(digits)
