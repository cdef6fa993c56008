"""What one can see of a pool's blocks: lists by filter, single ones, who holds them. Changes nothing.

Filters are masks over all blocks, so that a pool of a million blocks is looked through in milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

import numpy as np

from memory_service.block_hash import HASH_BYTES
from memory_service.block_pool import NULL_BLOCK
from memory_service.prefix_index import INDEXED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from memory_service.block_pool import BlockPool
    from memory_service.pool_view import PoolView
    from memory_service.session_books import SessionBooks

_NIBBLE: Final = 4


class BlockState(IntEnum):
    """Where a block is in its life; the numbers are those of `quire.memory.v1`."""

    FREE = 1
    CACHED = 2
    USED = 3
    NULL = 4


@dataclass(frozen=True, slots=True)
class BlockFilter:
    """What a block must be; all that is said must hold."""

    state: BlockState | None = None
    min_ref_count: int = 0
    key_prefix: str = ""  # hexadecimal
    sequence_id: str = ""
    retained: bool = False
    min_idle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """One block."""

    block_id: int
    state: BlockState
    ref_count: int
    is_pinned: bool
    is_sealed: bool
    key: bytes  # empty: it cannot be hit
    generation: int
    tenant: str
    idle_s: float
    retention_id: int  # 0: none
    priority: int


@dataclass(frozen=True, slots=True)
class BlockHolder:
    """A table entry that names a block."""

    sequence_id: str
    request_id: str
    session_id: str
    index: int


class BlockView:
    """The blocks that a `PoolView` shows: those that count against its tenant, all of them without one."""

    def __init__(self, view: PoolView) -> None:
        self._view = view
        self._pool = view.manager.pool
        self._now = view.manager.clock()

    # Lists

    def matches(self, wanted: BlockFilter) -> NDArray[np.intp]:
        """Ids of the blocks that pass, ascending."""
        mask = np.ones(self._pool.num_blocks, dtype=np.bool_)
        for condition in self._conditions(wanted):
            mask &= condition
        found = np.flatnonzero(mask)
        return self._with_key(found, wanted.key_prefix) if wanted.key_prefix else found

    def _conditions(self, wanted: BlockFilter) -> Iterator[NDArray[np.bool_]]:
        pool, view = self._pool, self._view
        if view.tenant is not None:
            yield view.own_blocks()
        if wanted.state is not None:
            yield block_states(pool) == wanted.state
        if wanted.min_ref_count > 0:
            yield pool.ref_counts >= wanted.min_ref_count
        if wanted.sequence_id:
            yield self._in_tables(wanted.sequence_id)
        if wanted.retained:
            yield view.in_homes([found.home.home_id for found in view.retentions()])
        if wanted.min_idle_s > 0:
            last_used = np.frombuffer(pool.last_used, np.float64)
            yield (last_used > 0) & (last_used <= self._now - wanted.min_idle_s)
        if wanted.key_prefix:
            yield np.frombuffer(pool.index.states, np.uint8) == INDEXED
            yield self._first_byte_fits(wanted.key_prefix)

    @property
    def _keys(self) -> NDArray[np.uint8]:
        return np.frombuffer(self._pool.index.keys, np.uint8).reshape(-1, HASH_BYTES)

    def _first_byte_fits(self, prefix: str) -> NDArray[np.bool_]:
        first, low, high = self._keys[:, 0], f"{prefix:0<2.2}", f"{prefix:f<2.2}"
        return (first >= int(low, 16)) & (first <= int(high, 16))

    def _in_tables(self, sequence_id: str) -> NDArray[np.bool_]:
        found = np.zeros(self._pool.num_blocks, dtype=np.bool_)
        for live in self._view.named(sequence_id):
            found[live.block_table] = True
        return found

    def _with_key(self, block_ids: NDArray[np.intp], prefix: str) -> NDArray[np.intp]:
        """Those of them whose key begins with the digits."""
        keys = self._keys
        whole = bytes.fromhex(prefix[: len(prefix) // 2 * 2])
        for where, wanted in enumerate(whole):
            block_ids = block_ids[keys[block_ids, where] == wanted]
        if len(prefix) % 2:
            high = keys[block_ids, len(whole)] >> _NIBBLE
            block_ids = block_ids[high == int(prefix[-1], 16)]
        return block_ids

    # Single blocks

    def is_shown(self, block_id: int) -> bool:
        """Whether there is such a block, and the tenant may see it."""
        if not 0 <= block_id < self._pool.num_blocks:
            return False
        home = self._pool.home_of(block_id)
        name = home.tenant.name if home else None
        return self._view.tenant is None or self._view.tenant == name

    def block(self, block_id: int) -> BlockInfo:
        """One block that is shown."""
        pool, home = self._pool, self._pool.home_of(block_id)
        is_retained = home is not None and home.priority > 0
        return BlockInfo(
            block_id,
            _state(pool, block_id),
            int(pool.ref_counts[block_id]),
            bool(pool.pins[block_id]),
            home is not None and bool(pool.sealed[block_id]),
            (pool.index.is_indexed(block_id) and pool.index.key_of(block_id)) or b"",
            pool.generations[block_id],
            home.tenant.name if home else "",
            self._idle_s(block_id),
            home.retention_id if home and is_retained else 0,
            home.priority if home else 0,
        )

    def _idle_s(self, block_id: int) -> float:
        """0 for a block that was never given out."""
        last_used = self._pool.last_used[block_id]
        return max(0.0, self._now - last_used) if last_used else 0.0

    # Holders

    def holders(self, block_id: int) -> list[BlockHolder]:
        """The table entries that name a used block, those of the tenant's sequences."""
        found: list[BlockHolder] = []
        for _, books in self._view.manager.sessions:
            for row, index in _entries_of(books, block_id):
                known = books.table[row]
                if self._view.tenant in {None, known.tenant.name}:
                    found.append(
                        BlockHolder(known.sequence_id, known.request_id, books.session_id, index)
                    )
        return found


def block_states(pool: BlockPool) -> NDArray[np.uint8]:
    """Of every block its `BlockState`."""
    is_held = (pool.ref_counts | pool.pins) != 0
    is_cached = (np.frombuffer(pool.index.states, np.uint8) == INDEXED) & ~is_held
    # Sums of bytes: ten times as fast as an assignment to the blocks of each state.
    states = np.full(pool.num_blocks, BlockState.FREE, dtype=np.uint8)
    states += is_cached.view(np.uint8) * np.uint8(BlockState.CACHED - BlockState.FREE)
    states += is_held.view(np.uint8) * np.uint8(BlockState.USED - BlockState.FREE)
    states[NULL_BLOCK] = BlockState.NULL
    return states


def _state(pool: BlockPool, block_id: int) -> BlockState:
    if block_id == NULL_BLOCK:
        return BlockState.NULL
    if pool.ref_counts[block_id] or pool.pins[block_id]:
        return BlockState.USED
    return BlockState.CACHED if pool.index.is_indexed(block_id) else BlockState.FREE


def _entries_of(books: SessionBooks, block_id: int) -> Iterator[tuple[int, int]]:
    """Rows and indexes of the session's table entries that name a block."""
    for rows, entries, is_entry in books.table.live_parts():
        for where, index in np.argwhere(is_entry & (entries == block_id)).tolist():
            yield int(rows[where]), index


def is_key_prefix(text: str) -> bool:
    """Whether keys may begin with these hexadecimal digits."""
    return len(text) <= 2 * HASH_BYTES and all(digit in "0123456789abcdef" for digit in text)


def is_duration(seconds: float) -> bool:
    """Whether it can be said that something lasted for so long."""
    return math.isfinite(seconds) and seconds >= 0
