"""Whether the books of a pool agree with each other."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from memory_service.block_pool import NULL_BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memory_service.block_manager import BlockManager
    from memory_service.session_books import SessionBooks
    from memory_service.tenants import Home


def check_integrity(manager: BlockManager) -> list[str]:
    """Every disagreement, in a sentence each; empty when all is well. Costs a walk over the pool and all tables."""
    return [
        *_check_counts(manager),
        *_check_references(manager),
        *_check_pins(manager),
        *_check_index(manager),
        *_check_sealed(manager),
        *_check_homes(manager),
        *_check_tenants(manager),
    ]


def _check_counts(manager: BlockManager) -> Iterator[str]:
    pool = manager.pool
    free, cached = list(pool.free_blocks()), list(pool.cached_blocks())
    held = (pool.ref_counts > 0) | (pool.pins > 0)
    states = Counter([*free, *cached, *np.flatnonzero(held).tolist(), NULL_BLOCK])
    for block_id in range(pool.num_blocks):
        if states[block_id] != 1:
            yield f"block {block_id} is in {states[block_id]} of the states free, cached, used, null"
    total = 1 + len(free) + len(cached) + int(held.sum())
    if total != pool.num_blocks:
        yield f"1 null + free + cached + used is {total}, the pool has {pool.num_blocks}"


def _check_references(manager: BlockManager) -> Iterator[str]:
    tables: Counter[int] = Counter()
    for _, books in manager.sessions:
        for row, _ in books.table.items():
            tables.update(books.table.block_table(row).tolist())
    for block_id, ref_count in enumerate(manager.pool.ref_counts.tolist()):
        if ref_count != tables[block_id]:
            yield f"block {block_id} has ref_count {ref_count}, {tables[block_id]} tables hold it"


def _check_pins(manager: BlockManager) -> Iterator[str]:
    sources: Counter[int] = Counter()
    for _, books in manager.sessions:
        sources.update(source for _, source in books.unacknowledged_copies)
    for block_id, pins in enumerate(manager.pool.pins.tolist()):
        if pins != sources[block_id]:
            yield f"block {block_id} has {pins} pins, {sources[block_id]} copies read it"


def _check_index(manager: BlockManager) -> Iterator[str]:
    pool, index = manager.pool, manager.pool.index
    indexed, chained = set(index.indexed_blocks()), Counter(index.chained_blocks())
    for block_id in indexed | set(chained):
        if chained[block_id] != 1 or block_id not in indexed:
            yield f"block {block_id} is {chained[block_id]} times in the prefix index"
    for block_id in indexed:
        key = index.key_of(block_id)
        if key is None or index.find(key) != block_id:
            yield f"block {block_id} does not answer for its own key"
        if not pool.sealed[block_id]:
            yield f"block {block_id} is in the prefix index and not sealed"
    if len(index) != len(indexed):
        yield f"the prefix index counts {len(index)} blocks and has {len(indexed)}"
    for block_id in pool.free_blocks():
        if block_id in indexed:
            yield f"block {block_id} is free and in the prefix index"


def _check_sealed(manager: BlockManager) -> Iterator[str]:
    for session_key, books in manager.sessions:
        for row, _ in books.table.items():
            yield from _check_row(manager, books, session_key, row)


def _check_row(
    manager: BlockManager, books: SessionBooks, session_key: int, row: int
) -> Iterator[str]:
    where = f"session {session_key} row {row}"
    entries = books.table.block_table(row)
    num_full = int(books.table.num_computed[row]) // manager.block_size
    if num_full > len(entries):
        yield f"{where} has {num_full} full blocks and a table of {len(entries)}"
    if not manager.pool.sealed[entries[:num_full]].all():
        yield f"{where} has an acknowledged full block that is not sealed"
    if manager.prefix_cache_enabled:
        for block_id in entries[:num_full].tolist():
            if manager.pool.index.key_of(block_id) is None:
                yield f"{where} has a full block {block_id} without a key"


def _check_homes(manager: BlockManager) -> Iterator[str]:
    pool = manager.pool
    counted = Counter(pool.home_ids.tolist())
    for block_id in np.flatnonzero(pool.home_ids == 0).tolist():
        if pool.ref_counts[block_id] or pool.index.is_indexed(block_id):
            yield f"block {block_id} is in use and counts nowhere"
    for block_id in pool.free_blocks():
        if pool.home_ids[block_id]:
            yield f"block {block_id} is free and counts against somebody"
    for home_id in counted.keys() - {0} - pool.homes.keys():
        yield f"{counted[home_id]} blocks count in home {home_id}, which is not there"
    for home in pool.homes.values():
        where = f"home {home.home_id} of tenant {home.tenant.name!r}"
        if counted[home.home_id] != home.num_blocks:
            yield f"{where} counts {home.num_blocks} blocks and has {counted[home.home_id]}"
        yield from _check_list(manager, home, where)
    num_retained = sum(home.num_blocks for home in pool.homes.values() if home.priority)
    if num_retained != pool.num_retained:
        yield f"{pool.num_retained} blocks are counted as retained, {num_retained} are"


def _check_list(manager: BlockManager, home: Home, where: str) -> Iterator[str]:
    pool = manager.pool
    listed = list(pool.queue.blocks(home))
    if len(listed) != home.num_cached:
        yield f"{where} counts {home.num_cached} cached blocks and lists {len(listed)}"
    stamps = [pool.queue.stamps[block_id] for block_id in listed]
    if stamps != sorted(stamps):
        yield f"{where} has its cached blocks out of order"
    for block_id in listed:
        if pool.home_ids[block_id] != home.home_id:
            yield f"{where} lists block {block_id}, which counts elsewhere"


def _check_tenants(manager: BlockManager) -> Iterator[str]:
    sequences = Counter(
        found.tenant.name for _, books in manager.sessions for _, found in books.table.items()
    )
    for tenant in manager.pool.tenants.values():
        homes = tenant.homes.values()
        counts = (
            sum(home.num_blocks for home in homes),
            sum(home.num_cached for home in homes),
            sequences[tenant.name],
        )
        if counts != (tenant.num_blocks, tenant.num_cached, tenant.num_sequences):
            yield f"tenant {tenant.name!r} counts other than {counts} blocks, cached, sequences"
        if not tenant.is_needed:
            yield f"tenant {tenant.name!r} has nothing left and is remembered"
    for name in sequences.keys() - manager.pool.tenants.keys():
        yield f"tenant {name!r} has sequences and is not known"
