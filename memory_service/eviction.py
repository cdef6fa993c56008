"""Cached blocks in the order in which they are given to others."""

from __future__ import annotations

from array import array
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final

import numpy as np

from memory_service.tenants import MAX_PRIORITY, Home, Tenant

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from memory_service.demand import IntArray

_MAX_STALE: Final = 64


class EvictionQueue:
    """Lists of cached blocks, one a home. The lowest priority goes first, then the least recently used.

    Within a home it is a linked list through arrays. Between homes the heads are compared by the stamp that a block got
    when it was cached. A heap for each priority holds every home that is not empty once, with a stamp that may be too
    old: stamps of a home's heads only rise, so an entry that is too old is put back with the right one when it comes up.
    All is O(1), choosing between homes logarithmic in their number.
    """

    def __init__(self, num_blocks: int) -> None:
        self.previous = array("i", bytes(4 * num_blocks))
        self.next = array("i", bytes(4 * num_blocks))
        self.stamps = array("q", bytes(8 * num_blocks))
        self.last_stamp = 0
        self.num_cached = 0
        self._heaps: list[list[tuple[int, int]]] = [[] for _ in range(MAX_PRIORITY + 1)]
        self._entered: set[tuple[int, int]] = set()  # (priority, home) pairs that a heap holds
        self._homes: dict[int, Home] = {}

    def add_home(self, home: Home) -> None:
        """Blocks may lie in `home` from now on."""
        self._homes[home.home_id] = home

    def drop_home(self, home: Home) -> None:
        """No block lies in `home` any more."""
        assert not home.num_cached
        del self._homes[home.home_id]

    def push(self, block_id: int, home: Home) -> None:
        """The block is cached; it was used just now."""
        self.last_stamp += 1
        self.stamps[block_id] = self.last_stamp
        self.link(block_id, home)

    def link(self, block_id: int, home: Home) -> None:
        """Append the block, which has its stamp."""
        tail = home.tail
        self.previous[block_id] = tail
        self.next[block_id] = 0
        if tail:
            self.next[tail] = block_id
        else:
            home.head = block_id
            self.enter(home)
        home.tail = block_id
        home.num_cached += 1
        home.tenant.num_cached += 1
        self.num_cached += 1

    def link_all(self, block_ids: IntArray, home: Home) -> None:
        """Fill an empty home with blocks, least recently used first, which have their stamps."""
        assert not home.num_cached
        previous, following = (
            np.frombuffer(found, np.int32) for found in (self.previous, self.next)
        )
        previous[block_ids], following[block_ids] = 0, 0
        previous[block_ids[1:]], following[block_ids[:-1]] = block_ids[:-1], block_ids[1:]
        home.head, home.tail = int(block_ids[0]), int(block_ids[-1])
        home.num_cached = len(block_ids)
        home.tenant.num_cached += len(block_ids)
        self.num_cached += len(block_ids)
        self.enter(home)

    def enter(self, home: Home) -> None:
        """See to it that the heap of the home's priority knows it; call it after the priority changed."""
        pair = (home.priority, home.home_id)
        if home.head and pair not in self._entered:
            if len(self._entered) > 2 * len(self._homes) + _MAX_STALE:
                self._rebuild()
            self._entered.add(pair)
            heappush(self._heaps[home.priority], (self.stamps[home.head], home.home_id))

    def _rebuild(self) -> None:
        """Forget the entries of homes that are gone: those of high priorities may never come up."""
        self._entered.clear()
        for heap in self._heaps:
            heap.clear()
        for home in self._homes.values():
            if home.head:
                self._entered.add((home.priority, home.home_id))
                heappush(self._heaps[home.priority], (self.stamps[home.head], home.home_id))

    def remove(self, block_id: int, home: Home) -> None:
        """The block is cached no more."""
        before, after = self.previous[block_id], self.next[block_id]
        if before:
            self.next[before] = after
        else:
            home.head = after
        if after:
            self.previous[after] = before
        else:
            home.tail = before
        home.num_cached -= 1
        home.tenant.num_cached -= 1
        self.num_cached -= 1

    def first_of(self, tenants: Iterable[Tenant]) -> Home | None:
        """The home whose head goes first among those of `tenants`; None when they have nothing cached."""
        homes = [home for found in tenants for home in found.homes.values() if home.head]
        return min(homes, key=lambda home: (home.priority, self.stamps[home.head]), default=None)

    def first(self) -> Home:
        """The home whose head goes first. Only called while something is cached."""
        for priority, heap in enumerate(self._heaps):
            while heap:
                stamp, home_id = heap[0]
                home = self._homes.get(home_id)
                is_here = home is not None and home.head and home.priority == priority
                if is_here and self.stamps[home.head] == stamp:  # type: ignore[union-attr]
                    assert home is not None
                    return home
                heappop(heap)
                self._entered.discard((priority, home_id))
                if is_here:
                    self.enter(home)  # type: ignore[arg-type]
        raise AssertionError("nothing is cached")

    def blocks(self, home: Home) -> Iterator[int]:
        """The cached blocks of a home, the next to be evicted first."""
        block_id = home.head
        while block_id:
            yield block_id
            block_id = self.next[block_id]
