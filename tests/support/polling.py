"""Wait for what another thread or process brings about, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 60.0
"""How long a test waits by default. A test that passes waits as long only on an overloaded machine."""
INTERVAL_S = 0.01


def eventually(read: Callable[[], T], expected: Callable[[T], object] = bool, *, within_s: float = PATIENCE_S) -> T:
    """Call `read` until `expected` accepts its value, and return the value.

    Raises AssertionError with the last value after `within_s`.
    """
    deadline = time.monotonic() + within_s
    while not expected(value := read()):
        assert time.monotonic() < deadline, f"still {value!r} after {within_s:g} s"
        time.sleep(INTERVAL_S)
    return value


def eventually_equal(read: Callable[[], T], expected: T, *, within_s: float = PATIENCE_S) -> None:
    """Call `read` until it returns `expected`; see `eventually`."""
    eventually(read, lambda value: value == expected, within_s=within_s)
