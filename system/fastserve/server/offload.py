"""Work that would hold up the event loop, in other threads.

The event loop sends every stream's tokens, so no callback may compute for long. A thread helps only if its work lets go
of the interpreter: between calls of Python functions, or inside a library that releases it. One call into C that does
neither must be short by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_QUICK_S = 0.005
"""Work of this length is done at once: its way to a thread and back costs as much."""
_LONG_S = 0.1


class Offload:
    """Runs functions in threads; of the long ones one at a time, so that what they take in memory does not add up."""

    def __init__(self) -> None:
        self._long = asyncio.Lock()

    async def run(self, estimate_s: float, function: Callable[[], T]) -> T:
        """What `function` returns, which takes about `estimate_s` seconds."""
        if estimate_s <= _QUICK_S:
            return function()
        if estimate_s <= _LONG_S:
            return await asyncio.to_thread(function)
        async with self._long:
            return await asyncio.to_thread(function)
