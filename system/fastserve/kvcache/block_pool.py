"""A pool of cache blocks, named by number."""

from __future__ import annotations

from fastserve.kvcache.errors import BlockOwnershipError, OutOfBlocksError


class BlockPool:
    """Hands out block numbers 0 .. num_blocks - 1, the most recently freed first: likeliest to be in a cache still."""

    __slots__ = ("_free", "name", "num_blocks")

    def __init__(self, name: str, num_blocks: int) -> None:
        self.name = name
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; OutOfBlocksError, and nothing taken, if fewer are free."""
        free = self._free
        if count > len(free):
            raise OutOfBlocksError(f"{self.name} pool: {count} blocks asked for, {len(free)} of {self.num_blocks} free")
        taken = free[len(free) - count :]
        del free[len(free) - count :]
        taken.reverse()
        return taken

    def free(self, blocks: list[int]) -> None:
        """Give blocks back."""
        self._free.extend(reversed(blocks))
        if len(self._free) > self.num_blocks:
            raise BlockOwnershipError(f"{self.name} pool: more blocks free than exist, some were freed twice")

    def check(self, owned: list[int]) -> None:
        """Raise BlockOwnershipError unless free and `owned` blocks together are each block exactly once (I2)."""
        if sorted([*self._free, *owned]) != list(range(self.num_blocks)):
            raise BlockOwnershipError(
                f"{self.name} pool of {self.num_blocks}: {len(self._free)} free and {len(owned)} owned blocks "
                "are not a partition"
            )
