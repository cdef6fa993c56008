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


def check_integrity(manager: BlockManager) -> list[str]:
    """Every disagreement, in a sentence each; empty when all is well. Costs a walk over the pool and all tables."""
    return [
        *_check_counts(manager),
        *_check_references(manager),
        *_check_pins(manager),
        *_check_index(manager),
        *_check_sealed(manager),
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
    pool = manager.pool
    for key, block_id in pool.index:
        if pool.index.key_of(block_id) != key:
            yield f"block {block_id} answers for key {key.hex()} and does not know it"
        if not pool.sealed[block_id]:
            yield f"block {block_id} is in the prefix index and not sealed"
    for block_id in pool.free_blocks():
        if pool.index.key_of(block_id) is not None:
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
    if manager.prefix_cache_enabled and len(books.table[row].keys) != num_full:
        yield f"{where} has {len(books.table[row].keys)} keys for {num_full} full blocks"
