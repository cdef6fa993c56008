"""What one can see of a pool: its sequences, and counts of its blocks and slots. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from memory_service.block_manager import BlockManager
    from memory_service.demand import IntArray
    from memory_service.retention import Retention
    from memory_service.sequence_table import Sequence
    from memory_service.session_books import SessionBooks
    from memory_service.tenants import Tenant

_MAX_COMPARED_HOMES = (
    4  # up to so many, one comparison each is faster than a look-up for every block
)


@dataclass(frozen=True, slots=True)
class LiveSequence:
    """A sequence and where it stands."""

    books: SessionBooks
    row: int
    known: Sequence

    @property
    def key(self) -> tuple[str, str, int]:
        """Orders all sequences. Two sessions may use the same id."""
        return self.known.sequence_id, self.books.session_id, self.row

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose keys and values are acknowledged."""
        return int(self.books.table.num_computed[self.row])

    @property
    def num_blocks(self) -> int:
        """Blocks in its table."""
        return int(self.books.table.num_blocks[self.row])

    @property
    def block_table(self) -> IntArray:
        """Its table, as a copy."""
        return self.books.table.block_table(self.row)


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Blocks that are in use, and how."""

    num_used: int  # of the whole pool: that is how full it is
    num_shared: int
    num_pinned: int
    num_retained: int


@dataclass(frozen=True, slots=True)
class SlotCounts:
    """Slots of all block tables; a shared block counts once for each."""

    num_tokens: int
    num_reserved: int
    num_unused: int


class PoolView:
    """A pool as one tenant may see it, or as everybody together: `tenant` None."""

    def __init__(self, manager: BlockManager, tenant: str | None) -> None:
        self.manager = manager
        self.tenant = tenant

    # Sequences

    def sequences(self) -> Iterator[LiveSequence]:
        """Live sequences, session by session."""
        for _, books in self.manager.sessions:
            for row, known in books.table.items():
                if self.tenant in {None, known.tenant.name}:
                    yield LiveSequence(books, row, known)

    def named(self, sequence_id: str) -> list[LiveSequence]:
        """The sequences of this id, the one that was admitted last first."""
        found = [
            LiveSequence(books, row, known)
            for _, books in self.manager.sessions
            for row, known in books.table.items()
            if known.sequence_id == sequence_id and self.tenant in {None, known.tenant.name}
        ]
        return sorted(found, key=lambda live: live.known.admitted_at, reverse=True)

    @property
    def num_sequences(self) -> int:
        """Live sequences."""
        if self.tenant is None:
            return self.manager.num_sequences
        return self.manager.pool.tenant_as_is(self.tenant).num_sequences

    @property
    def num_sessions(self) -> int:
        """Live sessions; for a tenant those that hold a sequence of it."""
        if self.tenant is None:
            return len(self.manager.ledger.sessions)
        return len({live.books.session_id for live in self.sequences()})

    def slots(self) -> SlotCounts:
        """What the slots of all block tables hold."""
        num_computed = num_reserved = num_blocks = 0
        for books, rows in self._rows():
            num_computed += int(books.table.num_computed[rows].sum(dtype=np.int64))
            num_reserved += int(books.table.num_reserved[rows].sum(dtype=np.int64))
            num_blocks += int(books.table.num_blocks[rows].sum(dtype=np.int64))
        num_slots = num_blocks * self.manager.block_size
        return SlotCounts(num_computed, num_reserved - num_computed, num_slots - num_reserved)

    def _rows(self) -> Iterator[tuple[SessionBooks, NDArray[np.intp]]]:
        for _, books in self.manager.sessions:
            rows = np.flatnonzero(books.table.is_live)
            if self.tenant is not None:
                names = [books.table[row].tenant.name for row in rows.tolist()]
                rows = rows[[name == self.tenant for name in names]]
            yield books, rows

    # Blocks

    def counts(self) -> BlockCounts:
        """Blocks in use."""
        pool = self.manager.pool
        num_used = int(np.count_nonzero(pool.ref_counts | pool.pins))
        shared, pinned, num_retained = pool.ref_counts > 1, pool.pins > 0, pool.num_retained
        if self.tenant is not None:
            own = self.own_blocks()
            shared, pinned = shared & own, pinned & own
            num_retained = sum(found.home.num_blocks for found in self.retentions())
        num_shared, num_pinned = (int(np.count_nonzero(each)) for each in (shared, pinned))
        return BlockCounts(num_used, num_shared, num_pinned, num_retained)

    def own_blocks(self) -> NDArray[np.bool_]:
        """Which blocks count against the tenant; only asked for one."""
        assert self.tenant is not None
        tenant = self.manager.pool.tenant_as_is(self.tenant)
        return self.in_homes([home.home_id for home in tenant.homes.values()])

    def in_homes(self, home_ids: list[int]) -> NDArray[np.bool_]:
        """Which blocks count in one of these homes."""
        pool = self.manager.pool
        found = np.zeros(pool.num_blocks, dtype=np.bool_)
        if len(home_ids) <= _MAX_COMPARED_HOMES:
            for home_id in home_ids:
                found |= pool.home_ids == home_id
            return found
        wanted = np.zeros(pool.last_home_id + 1, dtype=np.bool_)
        wanted[home_ids] = True
        return wanted[pool.home_ids]

    # Tenants and retentions

    def tenants(self) -> list[Tenant]:
        """Those of whom something is known, by name."""
        known = self.manager.pool.tenants
        names = known.keys() if self.tenant is None else known.keys() & {self.tenant}
        return [known[name] for name in sorted(names)]

    def retentions(self) -> list[Retention]:
        """Retentions, by id."""
        found = self.manager.ledger.retentions.by_id.values()
        mine = [each for each in found if self.tenant in {None, each.home.tenant.name}]
        return sorted(mine, key=lambda each: each.retention_id)
