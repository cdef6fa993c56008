"""Whether every cached block is in the list of its home, in order.

No list is walked. Links that agree in both directions, stamps that rise along them, one block without a predecessor and
one without a successor for each home: that leaves one list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memory_service.prefix_index import INDEXED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memory_service.block_manager import BlockManager


def check_links(manager: BlockManager, begin: int, end: int) -> Iterator[str]:
    """Each cached block of the range stands between its neighbours."""
    pool = manager.pool
    is_cached = np.frombuffer(pool.index.states, np.uint8)[begin:end] == INDEXED
    is_cached &= (pool.ref_counts[begin:end] | pool.pins[begin:end]) == 0
    blocks = begin + np.flatnonzero(is_cached)
    following, previous, stamps = (
        np.frombuffer(pool.queue.next, np.int32),
        np.frombuffer(pool.queue.previous, np.int32),
        np.frombuffer(pool.queue.stamps, np.int64),
    )
    behind, before = following[blocks], previous[blocks]
    fits = (before == 0) | (following[before] == blocks)
    fits &= (behind == 0) | (previous[behind] == blocks)
    for block_id in blocks[~fits].tolist():
        yield f"block {block_id} is not linked with its neighbours in the order of eviction"
    is_apart = (behind != 0) & (pool.home_ids[behind] != pool.home_ids[blocks])
    for block_id in blocks[is_apart].tolist():
        yield f"block {block_id} is listed before one that counts elsewhere"
    for block_id in blocks[(behind != 0) & (stamps[behind] <= stamps[blocks])].tolist():
        yield f"block {block_id} is listed before one that was used earlier"
    for block_id in blocks[before == 0].tolist():
        home = pool.home_of(block_id)
        if home is not None and home.head != block_id:
            yield f"block {block_id} has nobody before it and is not the head of its home"
    for block_id in blocks[behind == 0].tolist():
        home = pool.home_of(block_id)
        if home is not None and home.tail != block_id:
            yield f"block {block_id} has nobody behind it and is not the tail of its home"


def check_ends(manager: BlockManager) -> Iterator[str]:
    """The ends of every home's list are cached blocks of it, or there are none."""
    pool = manager.pool
    for home in pool.homes.values():
        where = f"home {home.home_id} of tenant {home.tenant.name!r}"
        if bool(home.head) != bool(home.num_cached) or bool(home.tail) != bool(home.num_cached):
            yield f"{where} counts {home.num_cached} cached blocks and lists {home.head} to {home.tail}"
        for block_id in {home.head, home.tail} - {0}:
            is_held = pool.ref_counts[block_id] or pool.pins[block_id]
            if is_held or pool.home_ids[block_id] != home.home_id:
                yield f"{where} lists block {block_id}, which is not cached there"
