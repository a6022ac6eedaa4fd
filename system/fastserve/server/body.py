"""A request's body: bounded before it is read, and again before it is parsed.

Parsing is one call into C that keeps every other thread waiting, and a small body can become a large object: 2 MiB of
`[1],` are a million of them, and 100 bytes each. So what a body has is counted first, which takes a few milliseconds.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from fastapi import Request

from fastserve.server.errors import APIError, bad_request, shown
from fastserve.server.offload import Offload

_MIB = 2**20
_BYTES_A_TOKEN = 32
"""A token is some 4 characters of text, for each of which JSON may take 6 bytes, or 7 bytes as an id."""
_LEAST_LIMIT = 2 * _MIB
_MOST_LIMIT = 8 * _MIB
"""What a text of a longer context needs too: a million tokens of English are 4 MiB."""
_LEAST_VALUES = 2**18
_SPARE_VALUES = 2**13
"""For what is not a prompt."""
_MAX_STRINGS = 2**16
_MAX_CONTAINERS = 2**14
_MAX_FRACTIONS = 2**12
_MAX_DIGITS = 100
_LONGEST_NAME = 100
_FREE = 65_536
"""Bytes of a body that do not count among those held: what a connection may have waiting anyhow."""
_MOST_HELD = 4 * _MOST_LIMIT

_PARSE_S_A_BYTE = 6e-8
_TEXTS = re.compile(rb'"[^"]*"')


@dataclass(frozen=True)
class BodyLimits:
    """How much one body may have."""

    num_bytes: int
    num_values: int
    """Numbers, texts, lists, … in it, and prompt tokens in all."""

    @classmethod
    def of_context(cls, num_tokens: int) -> BodyLimits:
        """Enough for a request of that many tokens, and for many shorter prompts at once."""
        num_bytes = min(max(_LEAST_LIMIT, num_tokens * _BYTES_A_TOKEN), _MOST_LIMIT)
        return cls(num_bytes, max(_LEAST_VALUES, num_tokens))


class Bodies:
    """The bodies that are being read, parsed or tokenized: each is bounded, and so are all of them together."""

    def __init__(self, limits: BodyLimits, offload: Offload) -> None:
        self.limits = limits
        self._offload = offload
        self._num_bytes_held = 0

    async def read(self, http: Request) -> bytes:
        """The bytes of a body. APIError 413 if they are too many, 503 if those of all requests are."""
        declared = http.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and len(declared) < 20:
            self._require_small(int(declared))
        chunks: list[bytes] = []
        size = 0
        async for chunk in http.stream():
            chunks.append(chunk)
            size += len(chunk)
            self._require_small(size)
            self._hold(http, max(0, size - _FREE))
        return b"".join(chunks)

    async def parse(self, body: bytes, convert: Callable[[Any], Any]) -> Any:
        """What `convert` makes of a body's value. Raises what `parse` and `convert` do."""
        return await self._offload.run(len(body) * _PARSE_S_A_BYTE, lambda: convert(parse(body, self.limits)))

    def release(self, http: Request) -> None:
        """Nothing is held any more of the request's body."""
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
        if size > held and self._num_bytes_held + size - held > _MOST_HELD:
            raise APIError(
                503,
                f"the bodies of other requests fill the {_MOST_HELD // _MIB} MiB that the server has for them; "
                "try again in 1 s",
                code="bodies_full",
                headers={"retry-after": "1"},
            )
        self._num_bytes_held += size - held
        http.state.num_body_bytes_held = size


class BoundedRequest(Request):
    """A request whose body is read, parsed and validated within bounds.

    FastAPI keeps what `body` and `json` return until the request is answered. So the first is only told from nothing,
    and the second is a valid object, without what the server ignores.
    """

    def __init__(self, http: Request, convert: Callable[[Any], Any]) -> None:
        """`convert`: from a value of JSON to that object."""
        super().__init__(http.scope, http.receive)
        self._convert = convert
        self._whole = b""

    async def body(self) -> bytes:
        """The first byte, if there is one, of what has been read. Raises what `Bodies.read` does."""
        self._whole = await self.app.state.bodies.read(self)
        return self._whole[:1]

    async def json(self) -> Any:
        """The object. Raises what `Bodies.parse` does."""
        encoding = self.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise bad_request(f"Content-Encoding {shown(encoding)} is not supported; send the body as it is")
        whole, self._whole = self._whole, b""
        return await self.app.state.bodies.parse(whole, self._convert)


def parse(body: bytes, limits: BodyLimits) -> Any:
    """The value of JSON in UTF-8. APIError 400 for what is not, or not within `limits`.

    No step keeps other threads waiting for long: what one call into C works on was counted before.
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
    # A quote within a text has a backslash before it, and so may a text's end; its beginning has none.
    num_strings = (body.count(b'"') - body.count(b'\\"')) // 2
    if num_strings > _MAX_STRINGS:
        _refuse("texts", _MAX_STRINGS)
    most_values = limits.num_values + _SPARE_VALUES
    if _num_containers(body) > _MAX_CONTAINERS or body.count(b",") > most_values:
        # Some may be in texts, which are few by now.
        body = _TEXTS.sub(b"", body.replace(rb"\\", b"").replace(rb"\"", b""))
        if _num_containers(body) > _MAX_CONTAINERS:
            _refuse("lists and objects", _MAX_CONTAINERS)
        if body.count(b",") > most_values:
            _refuse("values", most_values)


def _num_containers(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


def _refuse(what: str, most: int) -> NoReturn:
    raise bad_request(f"the body has more than {most} {what}; send less in one request")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise bad_request(f"the body has the field {shown(twice)} twice; send it once", twice[:_LONGEST_NAME])
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise bad_request(f"the body has a number of {len(digits)} digits; no field needs more than {_MAX_DIGITS}")
    return int(digits)
