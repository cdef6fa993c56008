"""Blocks: who is free, who is cached, who is used."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import numpy as np

from memory_service.prefix_index import PrefixIndex

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NULL_BLOCK: Final = 0


class BlockPool:
    """Reference counts, pins, the free list and the cached blocks in order of eviction. Every operation is O(1).

    A block other than the null block is in one of three states:
      free     nobody holds it and it holds nothing of worth
      cached   nobody holds it, but its content is in the prefix index
      used     tables hold it (`ref_count`), or copies not yet acknowledged read it (`pins`)

    A block whose reference count falls to zero is appended to the cached ones, so the order in which a table is released
    is the order of eviction: callers release tails first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = np.zeros(num_blocks, dtype=np.int32)
        self.pins = np.zeros(num_blocks, dtype=np.int32)
        self.sealed = np.zeros(num_blocks, dtype=np.bool_)
        self.index = PrefixIndex(num_blocks)
        self.num_evictions = 0
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # next to be evicted first

    @property
    def num_free(self) -> int:
        """Free blocks."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Cached blocks."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._cached)

    def free_blocks(self) -> Iterator[int]:
        """Ids of the free blocks."""
        return iter(self._free)

    def cached_blocks(self) -> Iterator[int]:
        """Ids of the cached blocks, the next to be evicted first."""
        return iter(self._cached)

    def allocate(self) -> int:
        """A block with reference count 1: a free one, else the cached one that nobody used for longest.

        Only called while `num_available` is above zero.
        """
        block_id = self._free.pop() if self._free else self._evict()
        self.ref_counts[block_id] = 1
        self.sealed[block_id] = False
        return block_id

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        self.index.remove(block_id)
        self.num_evictions += 1
        return block_id

    def acquire(self, block_id: int) -> None:
        """One more table holds the block, which is used or cached."""
        self._cached.pop(block_id, None)
        self.ref_counts[block_id] += 1

    def release(self, block_id: int) -> None:
        """One table less holds the block."""
        assert self.ref_counts[block_id] > 0
        self.ref_counts[block_id] -= 1
        self._settle(block_id)

    def pin(self, block_id: int) -> None:
        """A copy will read the block."""
        self.pins[block_id] += 1

    def unpin(self, block_id: int) -> None:
        """The copy was made, or will never be."""
        assert self.pins[block_id] > 0
        self.pins[block_id] -= 1
        self._settle(block_id)

    def _settle(self, block_id: int) -> None:
        if self.ref_counts[block_id] or self.pins[block_id]:
            return
        if self.index.key_of(block_id) is not None:
            self._cached[block_id] = None
        else:
            self._free.append(block_id)

    def num_unheld(self, block_ids: Iterable[int]) -> int:
        """How many of `block_ids` are cached: acquiring them makes fewer available."""
        return sum(block_id in self._cached for block_id in block_ids)

    def drop_cached(self) -> int:
        """Free every cached block; how many there were."""
        count = len(self._cached)
        while self._cached:
            block_id, _ = self._cached.popitem()
            self.index.remove(block_id)
            self._free.append(block_id)
        return count
