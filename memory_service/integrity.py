"""Whether the books of a pool agree with each other.

The checks are comparisons of whole arrays. A large pool is checked in parts of a few milliseconds, so that a service can
answer steps between them: each part holds for any state between two changes, whatever the other parts saw.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING, Final

import numpy as np

from memory_service.block_pool import NULL_BLOCK
from memory_service.index_integrity import (
    check_chains,
    check_keys,
    check_lineages,
    check_own_keys,
)
from memory_service.prefix_index import INDEXED
from memory_service.queue_integrity import check_ends, check_links

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from memory_service.block_manager import BlockManager
    from memory_service.block_pool import BlockPool
    from memory_service.demand import IntArray
    from memory_service.session_books import SessionBooks

_BLOCKS_AT_ONCE: Final = 1 << 13
_KEYS_AT_ONCE: Final = 256
_ROWS_AT_ONCE: Final = 64
_MAX_FINDINGS: Final = 50  # of one part: where more is wrong, the rest is wrong for the same reason
_UNKNOWN: Final = 0


def check_integrity(manager: BlockManager) -> list[str]:
    """Every disagreement, in a sentence each; empty when all is well."""
    parts = (*integrity_parts(manager), *key_parts(manager))
    return [finding for part in parts for finding in part]


def key_parts(manager: BlockManager) -> Iterator[list[str]]:
    """Whether blocks have the keys of their tokens, part by part: each is hashed again, 2 s for a million."""
    for begin in range(0, manager.pool.num_blocks, _KEYS_AT_ONCE):
        end = min(manager.pool.num_blocks, begin + _KEYS_AT_ONCE)
        yield _bounded(check_keys(manager, begin, end))


def integrity_parts(manager: BlockManager) -> Iterator[list[str]]:
    """Everything else, part by part. The state may change between two parts."""
    for whole in (
        _check_states,
        _check_references,
        _check_pins,
        _check_home_counts,
        _check_cached_counts,
        check_ends,
        _check_tenants,
    ):
        yield _bounded(whole(manager))
    num_blocks = manager.pool.num_blocks
    for begin in range(0, 2 * num_blocks, _BLOCKS_AT_ONCE):
        yield _bounded(check_chains(manager, begin, begin + _BLOCKS_AT_ONCE))
    for begin in range(0, num_blocks, _BLOCKS_AT_ONCE):
        end = min(num_blocks, begin + _BLOCKS_AT_ONCE)
        for sliced in (_check_block, check_own_keys, check_lineages, check_links):
            yield _bounded(sliced(manager, begin, end))
    yield from _table_parts(manager)


def _bounded(findings: Iterable[str]) -> list[str]:
    found = iter(findings)
    told = list(islice(found, _MAX_FINDINGS))
    num_more = sum(1 for _ in found)
    return [*told, f"and {num_more} more of this kind"] if num_more else told


# Blocks


def _is_held(pool: BlockPool) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (pool.ref_counts | pool.pins) != 0
    return found


def _is_indexed(pool: BlockPool) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.frombuffer(pool.index.states, np.uint8) == INDEXED
    return found


def _check_states(manager: BlockManager) -> Iterator[str]:
    pool = manager.pool
    is_held, is_indexed = _is_held(pool), _is_indexed(pool)
    is_listed = np.zeros(pool.num_blocks, dtype=np.bool_)
    is_listed[np.array(pool.free)] = True
    should_be = ~(is_held | is_indexed)
    if not should_be[NULL_BLOCK]:
        yield "the null block is in use"
    should_be[NULL_BLOCK] = False
    for block_id in np.flatnonzero(is_listed > should_be).tolist():
        yield f"block {block_id} is in the free list, and in use or in the prefix index"
    for block_id in np.flatnonzero(is_listed < should_be).tolist():
        yield f"block {block_id} is neither free nor cached nor used"
    if (num_twice := pool.num_free - np.count_nonzero(is_listed)) > 0:
        yield f"{num_twice} blocks are twice in the free list"
    total = 1 + pool.num_free + pool.num_cached + np.count_nonzero(is_held)
    if total != pool.num_blocks:
        yield f"1 null + free + cached + used is {total}, the pool has {pool.num_blocks}"
    if len(pool.index) != (num_indexed := np.count_nonzero(is_indexed)):
        yield f"the prefix index counts {len(pool.index)} blocks and has {num_indexed}"


def _check_block(manager: BlockManager, begin: int, end: int) -> Iterator[str]:
    pool = manager.pool
    is_indexed = np.frombuffer(pool.index.states, np.uint8)[begin:end] == INDEXED
    is_held = (pool.ref_counts[begin:end] | pool.pins[begin:end]) != 0
    has_home = pool.home_ids[begin:end] != 0
    for offset in np.flatnonzero(is_indexed & ~pool.sealed[begin:end]).tolist():
        yield f"block {begin + offset} is in the prefix index and not sealed"
    for offset in np.flatnonzero((is_held | is_indexed) > has_home).tolist():
        yield f"block {begin + offset} is in use or cached and counts nowhere"
    for offset in np.flatnonzero((is_held | is_indexed) < has_home).tolist():
        yield f"block {begin + offset} is free and counts against somebody"


# Tables


def _entries(books: SessionBooks) -> Iterator[IntArray]:
    """What all tables of a session hold."""
    for _, entries, is_entry in books.table.live_parts():
        yield entries[is_entry]


def _check_references(manager: BlockManager) -> Iterator[str]:
    pool = manager.pool
    held = [np.empty(0, dtype=np.int32)]
    for _, books in manager.sessions:
        held += _entries(books)
    num_tables = np.bincount(np.concatenate(held), minlength=pool.num_blocks)
    for block_id in np.flatnonzero(pool.ref_counts != num_tables).tolist():
        ref_count = pool.ref_counts[block_id]
        yield f"block {block_id} has ref_count {ref_count}, {num_tables[block_id]} tables hold it"


def _check_pins(manager: BlockManager) -> Iterator[str]:
    pins, sources = manager.pool.pins, Counter[int]()
    for _, books in manager.sessions:
        sources.update(source for _, source in books.unacknowledged_copies)
    for block_id in sorted(sources.keys() | set(np.flatnonzero(pins).tolist())):
        if pins[block_id] != sources[block_id]:
            yield f"block {block_id} has {pins[block_id]} pins, {sources[block_id]} copies read it"


def _table_parts(manager: BlockManager) -> Iterator[list[str]]:
    for session_key in list(manager.ledger.sessions):
        begin, max_num_rows = 0, 1
        while begin < max_num_rows:
            books = manager.ledger.sessions.get(session_key)
            if books is None:  # it ended since
                break
            max_num_rows, end = books.table.max_num_rows, begin + _ROWS_AT_ONCE
            yield _bounded(_check_rows(manager, session_key, books, begin, end))
            begin = end


def _check_rows(
    manager: BlockManager, session_key: int, books: SessionBooks, begin: int, end: int
) -> Iterator[str]:
    for row in (begin + np.flatnonzero(books.table.is_live[begin:end])).tolist():
        yield from _check_row(manager, books, f"session {session_key} row {row}", row)


def _check_row(manager: BlockManager, books: SessionBooks, where: str, row: int) -> Iterator[str]:
    entries, pool = books.table.block_table(row), manager.pool
    num_full = int(books.table.num_computed[row]) // manager.block_size
    if num_full > len(entries):
        yield f"{where} has {num_full} full blocks and a table of {len(entries)}"
    full = entries[:num_full]
    if not pool.sealed[full].all():
        yield f"{where} has an acknowledged full block that is not sealed"
    if manager.prefix_cache_enabled:
        states = np.frombuffer(pool.index.states, np.uint8)[full]
        for block_id in full[states == _UNKNOWN].tolist():
            yield f"{where} has a full block {block_id} without a key"


# Homes and tenants


def _check_home_counts(manager: BlockManager) -> Iterator[str]:
    pool = manager.pool
    counted = np.bincount(pool.home_ids, minlength=pool.last_home_id + 1)
    counted[0] = 0
    for home_id in set(np.flatnonzero(counted).tolist()) - pool.homes.keys():
        yield f"{counted[home_id]} blocks count in home {home_id}, which is not there"
    for home in pool.homes.values():
        if counted[home.home_id] != home.num_blocks:
            where = f"home {home.home_id} of tenant {home.tenant.name!r}"
            yield f"{where} counts {home.num_blocks} blocks and has {counted[home.home_id]}"
    num_retained = sum(home.num_blocks for home in pool.homes.values() if home.priority)
    if num_retained != pool.num_retained:
        yield f"{pool.num_retained} blocks are counted as retained, {num_retained} are"


def _check_cached_counts(manager: BlockManager) -> Iterator[str]:
    pool = manager.pool
    is_cached = _is_indexed(pool) & ~_is_held(pool)
    counted = np.bincount(pool.home_ids * is_cached, minlength=pool.last_home_id + 1)
    for home in pool.homes.values():
        if counted[home.home_id] != home.num_cached:
            where = f"home {home.home_id} of tenant {home.tenant.name!r}"
            yield f"{where} counts {home.num_cached} cached blocks and has {counted[home.home_id]}"
    if (num_cached := np.count_nonzero(is_cached)) != pool.num_cached:
        yield f"{pool.num_cached} blocks are counted as cached, {num_cached} are"


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
