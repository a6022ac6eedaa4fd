"""The id of an HTTP request, the client's or one made up: in its response, the engine, the timeline and the page."""

from __future__ import annotations

import itertools
import re
import uuid
from typing import NamedTuple

_ACCEPTED = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_serial = itertools.count(1)


class RequestId(NamedTuple):
    """What identifies a request, to its client and to the engine."""

    said: str
    """In the header x-request-id of the response, and in the answer's id."""
    unique: str
    """The same where it was made up. A client may use an id twice, and repeats a request that it has given up with the
    same one: the engine's has a serial number."""


def request_id(given: bytes) -> RequestId:
    """The client's own if it has at most 128 characters, all letters, digits or of `._:/+=@-`; else one made up."""
    if _ACCEPTED.fullmatch(given):
        said = given.decode()
        return RequestId(said, f"{said}.{next(_serial)}")
    made_up = uuid.uuid4().hex[:24]
    return RequestId(made_up, made_up)
