"""A pool that reuses free blocks as late as it can, so that their content may be taken up again."""

from __future__ import annotations

from collections import OrderedDict

from fastserve.kvcache.block_pool import BlockPool
from fastserve.kvcache.errors import BlockOwnershipError, OutOfBlocksError


class OldestFirstPool(BlockPool):
    """Hands out blocks that were never used, then those that have been free longest; or a certain free block.

    Of blocks freed together the last is handed out first: a sequence needs its first blocks most. This is vLLM's order.
    """

    __slots__ = ("_free",)

    def __init__(self, name: str, num_blocks: int) -> None:
        super().__init__(name, num_blocks)
        self._free: OrderedDict[int, None] = OrderedDict()
        """Blocks that were given back, in the order in which they will be handed out."""

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; OutOfBlocksError, and nothing taken, if fewer are free."""
        if count > self.num_free:
            raise OutOfBlocksError(
                f"{self.name} pool: {count} blocks asked for, {self.num_free} of {self.num_blocks} free"
            )
        self.num_free -= count
        first = self._num_used
        self._num_used = min(first + count, self.num_blocks)
        taken = list(range(first, self._num_used))
        while len(taken) < count:
            block, _ = self._free.popitem(last=False)
            taken.append(block)
        return taken

    def take_up(self, blocks: list[int]) -> None:
        """Take these blocks, which are free, with what they hold."""
        for block in blocks:
            del self._free[block]
        self.num_free -= len(blocks)

    def free(self, blocks: list[int]) -> None:
        """Give blocks back, in the order of the tokens they hold."""
        self.num_free += len(blocks)
        for block in reversed(blocks):
            self._free[block] = None
        if self.num_free != self.num_blocks - self._num_used + len(self._free):
            raise BlockOwnershipError(f"{self.name} pool: a block was freed twice")

    def check(self, owned: list[int]) -> None:
        """Raise BlockOwnershipError unless free and `owned` blocks together are each block exactly once (I2)."""
        each_once = sorted([*self._free, *owned]) == list(range(self._num_used))
        if not each_once or self.num_free != self.num_blocks - len(owned):
            raise BlockOwnershipError(
                f"{self.name} pool of {self.num_blocks}: {self.num_free} free and {len(owned)} owned blocks "
                "are not a partition"
            )
