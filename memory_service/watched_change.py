"""What a watcher is told of a change, taken from the books at the moment of the change, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

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
    from memory_service.record import Change, Record, ReleaseReason
    from memory_service.sequence_table import SequenceTable


_FREE = np.int32(BlockState.FREE)
_CACHED = np.int32(BlockState.CACHED)
_USED = np.int32(BlockState.USED)

TableChange: TypeAlias = tuple[int, int, int]  # row, index, block that the entry names now


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
class WatchedStep:
    """What a step did to the sequences of its session."""

    number: int
    progressed_rows: IntArray
    progressed_num_computed: IntArray
    started: list[WatchedSequence]
    table_changes: list[TableChange]


@dataclass(frozen=True, slots=True)
class WatchedChange:
    """One change."""

    revision: int
    time: float  # seconds since the epoch
    session_id: str
    event: str  # what happened, in a sentence; empty for a step
    step: WatchedStep | None
    ended: list[WatchedEnd]
    changed_block_ids: IntArray
    changed_states: IntArray
    changed_ref_counts: IntArray
    evicted_block_ids: list[int]
    counts: WatchedCounts
    tenants: list[WatchedTenant]

    @property
    def num_bytes(self) -> int:
        """About what it takes as a message, and in memory."""
        num_numbers = 3 * len(self.changed_block_ids) + len(self.evicted_block_ids)
        num_names = len(self.ended) + len(self.tenants)
        if self.step is not None:
            num_numbers += 2 * len(self.step.progressed_rows) + 3 * len(self.step.table_changes)
            num_numbers += sum(len(found.block_table) for found in self.step.started)
            num_names += 2 * len(self.step.started)
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
        change, touched = record.change, set(self._manager.pool.touched)
        before = self._session_id(change)
        ended = [
            WatchedEnd(each.row, each.sequence.sequence_id, each.reason)
            for each in self._names.follow(change)
        ]
        session_id = before or self._session_id(change)
        event, step = "", None
        if isinstance(change, StepApplied):
            step = self._step(record.time, change, session_id, ended, touched)
        else:
            event = sentence_of(change, session_id, is_known=bool(before))
        return WatchedChange(
            record.revision,
            record.time,
            session_id,
            event,
            step,
            ended,
            *self._changed_blocks(touched),
            [each.block_id for each in self._manager.pool.evictions],
            WatchedCounts.of(self._manager),
            self._changed_tenants(),
        )

    def _session_id(self, change: Change) -> str:
        """Asked before an ended session is forgotten, and after a new one is known."""
        if not isinstance(change, StepApplied | SessionOpened | SessionEnded):
            return ""
        session = self._names.sessions.get(change.session_key)
        return session.session_id if session else ""

    def _changed_blocks(self, touched: set[int]) -> tuple[IntArray, IntArray, IntArray]:
        pool = self._manager.pool
        ids = np.array(sorted(touched), dtype=np.int32)
        ref_counts = pool.ref_counts[ids]
        states = np.where(self._index_states[ids] == INDEXED, _CACHED, _FREE)
        states = np.where(ref_counts | pool.pins[ids], _USED, states)
        return ids, states, ref_counts

    def _changed_tenants(self) -> list[WatchedTenant]:
        """Those that differ; one that was forgotten is told of with nothing left."""
        before, now = self._tenants, watched_tenants(self._manager)
        self._tenants = now
        changed = [found for name, found in now.items() if before.get(name) != found]
        return changed + [WatchedTenant.of(Tenant(name)) for name in before.keys() - now.keys()]

    def _step(
        self,
        now: float,
        change: StepApplied,
        session_id: str,
        ended: list[WatchedEnd],
        touched: set[int],
    ) -> WatchedStep:
        table = self._manager.table(change.session_key)
        rows = [fork.dst_row for fork in change.forks]
        rows += [admission.row for admission in change.admissions]
        return WatchedStep(
            change.step,
            change.commit_rows,
            change.commit_num_computed_tokens,
            [WatchedSequence.of(session_id, row, table, now) for row in rows],
            _table_changes(change, {*rows, *(each.row for each in ended)}, touched),
        )


def _table_changes(change: StepApplied, gone: set[int], touched: set[int]) -> list[TableChange]:
    """Entries of the rows that lived before and live on, in the order in which they changed."""
    # Sealing touches no block but when a duplicate gives way to the one that stays.
    remaps = [
        (row, index, block_id)
        for row, index, block_id in change.seals.tolist()
        if block_id in touched and row not in gone
    ]
    takes = change.takes[:, :3].tolist()
    return remaps + [(row, index, found) for row, index, found in takes if row not in gone]


def watched_tenants(manager: BlockManager) -> dict[str, WatchedTenant]:
    """Copies of all tenants."""
    return {name: WatchedTenant.of(found) for name, found in manager.pool.tenants.items()}
