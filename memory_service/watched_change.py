"""What a watcher is told of a change, taken from the books at the moment of the change, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from memory_service.block_view import BlockState
from memory_service.change_sentences import sentence_of
from memory_service.live_names import LiveNames
from memory_service.prefix_index import INDEXED
from memory_service.record import SessionEnded, SessionOpened, StepApplied
from memory_service.tenants import Tenant

if TYPE_CHECKING:
    from memory_service.block_manager import BlockManager
    from memory_service.demand import IntArray
    from memory_service.record import Record, ReleaseReason
    from memory_service.sequence_table import SequenceTable


def _no_ints() -> IntArray:
    return np.empty(0, dtype=np.int32)


def _no_entries() -> IntArray:
    return np.empty((0, 3), dtype=np.int32)


@dataclass(frozen=True, slots=True)
class WatchedSequence:
    """A sequence as it was."""

    session_id: str
    row: int
    sequence_id: str
    request_id: str
    tenant: str
    incarnation: int
    num_cached_tokens: int
    num_computed_tokens: int
    age_s: float
    block_table: IntArray

    @classmethod
    def of(cls, session_id: str, row: int, table: SequenceTable, now: float) -> WatchedSequence:
        """A copy of what is in `row`."""
        known = table[row]
        return cls(
            session_id,
            row,
            known.sequence_id,
            known.request_id,
            known.tenant.name,
            known.incarnation,
            known.num_cached_tokens,
            int(table.num_computed[row]),
            max(0.0, now - known.admitted_at),
            table.block_table(row),
        )


@dataclass(frozen=True, slots=True)
class WatchedEnd:
    """A sequence that was released."""

    row: int
    sequence_id: str
    reason: ReleaseReason


@dataclass(frozen=True, slots=True)
class WatchedTenant:
    """A tenant as it was."""

    name: str
    num_blocks: int
    num_cached_blocks: int
    num_sequences: int
    soft_blocks: int | None
    hard_blocks: int | None

    @classmethod
    def of(cls, tenant: Tenant) -> WatchedTenant:
        """A copy."""
        return cls(
            tenant.name,
            tenant.num_blocks,
            tenant.num_cached,
            tenant.num_sequences,
            tenant.soft_blocks,
            tenant.hard_blocks,
        )


@dataclass(frozen=True, slots=True)
class WatchedCounts:
    """How full the pool was."""

    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_sequences: int
    num_query_tokens: int
    num_hit_tokens: int
    num_evictions: int

    @classmethod
    def of(cls, manager: BlockManager) -> WatchedCounts:
        """A copy."""
        pool, counters = manager.pool, manager.ledger.counters
        return cls(
            pool.num_blocks,
            pool.num_free,
            pool.num_cached,
            manager.num_sequences,
            counters.num_query_tokens,
            counters.num_hit_tokens,
            pool.num_evictions,
        )

    @property
    def num_used_blocks(self) -> int:
        """All others but the null block."""
        return self.num_blocks - 1 - self.num_free_blocks - self.num_cached_blocks


@dataclass(frozen=True, slots=True)
class WatchedChange:
    """One change."""

    revision: int
    time: float  # seconds since the epoch
    counts: WatchedCounts
    changed_block_ids: IntArray
    changed_states: IntArray
    changed_ref_counts: IntArray
    tenants: list[WatchedTenant]
    session_id: str = ""
    step: int = 0
    event: str = ""  # what happened, in a sentence; empty for a step
    ended: list[WatchedEnd] = field(default_factory=list)
    started: list[WatchedSequence] = field(default_factory=list)
    progressed_rows: IntArray = field(default_factory=_no_ints)
    progressed_num_computed: IntArray = field(default_factory=_no_ints)
    table_changes: IntArray = field(default_factory=_no_entries)  # (row, index, block) each
    evicted_block_ids: list[int] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """About what it takes as a message, and in memory."""
        num_numbers = 3 * len(self.changed_block_ids) + 2 * len(self.progressed_rows)
        num_numbers += self.table_changes.size + len(self.evicted_block_ids)
        num_numbers += sum(len(found.block_table) for found in self.started)
        num_names = len(self.ended) + 2 * len(self.started) + len(self.tenants)
        return 256 + 4 * num_numbers + 160 * num_names


class ChangeReader:
    """Reads changes off the books; must hear every one from the state on that it began with."""

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        self._names = LiveNames(manager)
        self._tenants = watched_tenants(manager)
        self._index_states = np.frombuffer(manager.pool.index.states, np.uint8)

    def read(self, record: Record) -> WatchedChange:
        """The change that `record` tells of, which was made just now and after which nothing was."""
        change = record.change
        session_id = self._session_id(record)
        ended = self._names.follow(change)
        found = WatchedChange(
            record.revision,
            record.time,
            WatchedCounts.of(self._manager),
            *self._changed_blocks(),
            tenants=self._changed_tenants(),
            session_id=session_id or self._session_id(record),
            ended=[WatchedEnd(each.row, each.sequence.sequence_id, each.reason) for each in ended],
            evicted_block_ids=[each.block_id for each in self._manager.pool.evictions],
        )
        if isinstance(change, StepApplied):
            return self._add_step(found, change)
        return replace(
            found, event=sentence_of(change, found.session_id, is_known=bool(session_id))
        )

    def _session_id(self, record: Record) -> str:
        """Before an ended session is forgotten, or after a new one is known."""
        change = record.change
        if not isinstance(change, StepApplied | SessionOpened | SessionEnded):
            return ""
        session = self._names.sessions.get(change.session_key)
        return session.session_id if session else ""

    def _changed_blocks(self) -> tuple[IntArray, IntArray, IntArray]:
        pool = self._manager.pool
        ids = np.array(sorted(set(pool.touched)), dtype=np.int32)
        ref_counts = pool.ref_counts[ids]
        states = np.full(len(ids), BlockState.FREE, dtype=np.int32)
        states[self._index_states[ids] == INDEXED] = BlockState.CACHED
        states[(ref_counts > 0) | (pool.pins[ids] > 0)] = BlockState.USED
        return ids, states, ref_counts

    def _changed_tenants(self) -> list[WatchedTenant]:
        """Those that differ; one that was forgotten is told of with nothing left."""
        before, now = self._tenants, watched_tenants(self._manager)
        self._tenants = now
        changed = [found for name, found in now.items() if before.get(name) != found]
        return changed + [WatchedTenant.of(Tenant(name)) for name in before.keys() - now.keys()]

    def _add_step(self, found: WatchedChange, change: StepApplied) -> WatchedChange:
        table = self._manager.table(change.session_key)
        rows = [fork.dst_row for fork in change.forks]
        rows += [admission.row for admission in change.admissions]
        gone = rows + [each.row for each in found.ended]
        return replace(
            found,
            step=change.step,
            started=[WatchedSequence.of(found.session_id, row, table, found.time) for row in rows],
            progressed_rows=change.commit_rows,
            progressed_num_computed=change.commit_num_computed_tokens,
            table_changes=self._table_changes(change, found.changed_block_ids, gone),
        )

    def _table_changes(
        self, change: StepApplied, changed_block_ids: IntArray, gone: list[int]
    ) -> IntArray:
        """Entries of the rows that lived before and live on, in the order in which they changed."""
        # Sealing touches no block but when a duplicate gives way to the one that stays.
        remaps = change.seals[np.isin(change.seals[:, 2], changed_block_ids)]
        entries = np.concatenate([remaps, change.takes[:, :3]])
        return entries[~np.isin(entries[:, 0], gone)] if gone else entries


def watched_tenants(manager: BlockManager) -> dict[str, WatchedTenant]:
    """Copies of all tenants."""
    return {name: WatchedTenant.of(found) for name, found in manager.pool.tenants.items()}
