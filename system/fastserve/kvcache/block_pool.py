"""A pool of cache blocks, named by number."""

from __future__ import annotations

from fastserve.kvcache.errors import BlockOwnershipError, OutOfBlocksError


class BlockPool:
    """Hands out block numbers 0 .. num_blocks - 1, the most recently freed first, which is most likely still cached."""

    __slots__ = ("_freed", "_num_used", "name", "num_blocks", "num_free")

    def __init__(self, name: str, num_blocks: int) -> None:
        self.name = name
        self.num_blocks = num_blocks
        self._freed: list[int] = []
        self._num_used = 0
        """Blocks from here on were never given out, and are not listed: a large pool costs nothing to make."""
        self.num_free = num_blocks
        """Blocks without an owner."""

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; OutOfBlocksError, and nothing taken, if fewer are free."""
        if count > self.num_free:
            raise OutOfBlocksError(
                f"{self.name} pool: {count} blocks asked for, {self.num_free} of {self.num_blocks} free"
            )
        self.num_free -= count
        freed = self._freed
        kept = len(freed) - count
        if kept >= 0:
            taken = freed[kept:]
            del freed[kept:]
            taken.reverse()
            return taken
        first = self._num_used
        self._num_used = first - kept
        taken = freed[::-1]
        freed.clear()
        taken.extend(range(first, self._num_used))
        return taken

    def free(self, blocks: list[int]) -> None:
        """Give blocks back."""
        self._freed += blocks[::-1]
        self.num_free += len(blocks)
        if len(self._freed) > self._num_used:
            raise BlockOwnershipError(f"{self.name} pool: more blocks free than exist, some were freed twice")

    def check(self, owned: list[int]) -> None:
        """Raise BlockOwnershipError unless free and `owned` blocks together are each block exactly once (I2)."""
        each_once = sorted([*self._freed, *owned]) == list(range(self._num_used))
        if not each_once or self.num_free != self.num_blocks - len(owned):
            raise BlockOwnershipError(
                f"{self.name} pool of {self.num_blocks}: {self.num_free} free and {len(owned)} owned blocks "
                "are not a partition"
            )
