"""The id of an HTTP request: in its response, in the engine, in the timeline and on the live page."""

from __future__ import annotations

import itertools
import re
import uuid
from typing import NamedTuple

_ACCEPTED = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_serial = itertools.count(1)


class RequestId(NamedTuple):
    """A request's id for its client and for the engine."""

    said: str
    """In the response's header x-request-id and in the answer's id."""
    unique: str
    """In the engine. It differs where a client uses an id twice, such as for a retry: a serial number is added."""


def request_id(given: bytes) -> RequestId:
    """Return the client's own id if it has at most 128 letters, digits or `._:/+=@-`; else a new one."""
    if _ACCEPTED.fullmatch(given):
        said = given.decode()
        return RequestId(said, f"{said}.{next(_serial)}")
    new = uuid.uuid4().hex[:24]
    return RequestId(new, new)
