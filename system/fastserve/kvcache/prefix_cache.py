"""PrefixCache: which block holds which part of which sequence, until it is given to another."""

from __future__ import annotations

from fastserve.core.request import Request

Key = tuple[Request, int]
"""What a full block holds: the request's tokens `index * block_size` to `(index + 1) * block_size - 1`."""


class PrefixCache:
    """Finds blocks by what they hold.

    A request never changes a token, so what a full block holds stays true until the block is given out anew.
    """

    def __init__(self) -> None:
        self._blocks: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        """Of each block whose content is known: what it holds."""

    def remember(self, request: Request, blocks: list[int]) -> None:
        """`blocks` hold the request's first tokens, and are full."""
        for index, block in enumerate(blocks):
            key = (request, index)
            self._blocks[key] = block
            self._keys[block] = key

    def find(self, request: Request, most: int) -> list[int]:
        """The blocks that hold the request's first tokens, as far as they are known; at most `most`."""
        found: list[int] = []
        known = self._blocks
        while len(found) < most:
            block = known.get((request, len(found)))
            if block is None:
                break
            found.append(block)
        return found

    def forget(self, blocks: list[int]) -> None:
        """`blocks` are given out anew, and will be overwritten."""
        for block in blocks:
            key = self._keys.pop(block, None)
            if key is not None and self._blocks[key] == block:
                del self._blocks[key]
