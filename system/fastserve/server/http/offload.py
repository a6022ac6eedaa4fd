"""Work that would hold up the event loop, run in other threads.

The event loop sends every stream's tokens, so no callback may compute for long. A thread helps only if its work
releases the interpreter: between calls of Python functions, or inside a library that does. A call into C that never
releases it must be short.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_QUICK_S = 0.005
"""Shorter work runs at once: a thread would cost as much."""
_LONG_S = 0.1
_FEW = 256
"""Scored tokens that are written at once: a thread would cost as much."""


class Offload:
    """Runs functions in threads. Long ones run one at a time, so that their memory does not add up."""

    def __init__(self) -> None:
        self._long = asyncio.Lock()

    async def run(self, estimate_s: float, function: Callable[[], T]) -> T:
        """Return what `function` returns; it takes about `estimate_s` seconds."""
        if estimate_s <= _QUICK_S:
            return function()
        if estimate_s <= _LONG_S:
            return await asyncio.to_thread(function)
        async with self._long:
            return await asyncio.to_thread(function)


async def in_thread_if_many(count: int, write: Callable[[], T]) -> T:
    """Return what `write` returns; its time grows with `count`, as that of writing so many scored tokens."""
    return write() if count <= _FEW else await asyncio.to_thread(write)
