"""Who owns which KV block. Holds no tensors: a block is a number.

A block is held (by one or more requests), cached (held by none, but it still stores a known prefix) or free. Cached
blocks are given away only when no free one is left, least recently released first.
"""

from collections import OrderedDict
from collections.abc import Sequence

from vivace.engine.prefix import PrefixIndex


class BlockPool:
    """Counts references. The scheduler is its only caller; every change is all or nothing."""

    def __init__(self, num_blocks: int, prefix: PrefixIndex) -> None:
        self._prefix = prefix
        self._num_holders = [0] * num_blocks
        self._num_uses = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack, lowest number on top
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return len(self._num_holders)

    @property
    def num_available(self) -> int:
        """Blocks that `take` can hand out: free or cached."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that store a prefix."""
        return len(self._cached)

    def num_holders(self, block: int) -> int:
        """How many requests hold a block."""
        return self._num_holders[block]

    def use(self, block: int) -> int:
        """The how-manieth use this is of a block. What is known of its content holds for this one alone."""
        return self._num_uses[block]

    def take(self, count: int) -> list[int] | None:
        """`count` blocks for one holder, or None, with nothing changed, if there are not that many."""
        if count > self.num_available:
            return None
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            assert self._num_holders[block] == 0
            self._num_holders[block] = 1
            self._num_uses[block] += 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add a holder to blocks that the prefix index named."""
        for block in blocks:
            self._cached.pop(block, None)
            self._num_holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take one holder away from each. The last goes first, so that a prefix outlives what follows it."""
        for block in reversed(blocks):
            assert self._num_holders[block] > 0
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                if block in self._prefix:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._prefix.forget(block)
        return block
