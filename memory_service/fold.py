"""Records to state: brings a pool that has seen all earlier records to the revision of the next one."""

from __future__ import annotations

from functools import singledispatchmethod
from typing import TYPE_CHECKING

import numpy as np

from memory_service.block_hash import split_keys
from memory_service.ledger import APPENDED, NewSequence
from memory_service.record import (
    AdmissionRecord,
    Change,
    Flushed,
    PrefixPublished,
    PrefixWithdrawn,
    QuotaSet,
    Record,
    Retained,
    RetentionEnded,
    SessionEnded,
    SessionOpened,
    StepApplied,
    WriterAttached,
)
from memory_service.sharing import apply_flush, apply_quota, apply_retained

if TYPE_CHECKING:
    from memory_service.block_manager import BlockManager
    from memory_service.session_books import SessionBooks


class FoldError(Exception):
    """A record cannot follow the state that it meets."""


class Fold:
    """Applies records to a manager that nobody else uses meanwhile; its observers hear of each."""

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        self._ledger = manager.ledger
        self._pool = manager.pool

    def apply(self, record: Record) -> None:
        """Apply the next record.

        Raises:
            FoldError: when it is not the next, or tells of what cannot have happened. The state is undefined then.
        """
        if record.revision != self._ledger.revision + 1:
            message = f"revision {record.revision} does not follow {self._ledger.revision}"
            raise FoldError(message)
        self._pool.begin_change(record.time)
        try:
            self._apply(record.change)
        except (AssertionError, KeyError, IndexError, ValueError) as error:
            message = f"revision {record.revision} does not fit the state before it: {error!r}"
            raise FoldError(message) from error
        self._ledger.revision = record.revision
        for observer in self._manager.observers:
            observer(record)

    @singledispatchmethod
    def _apply(self, change: Change) -> None:
        raise AssertionError(change)

    @_apply.register
    def _(self, change: SessionOpened) -> None:
        self._ledger.open_session(
            change.session_key, change.session_id, change.max_num_rows, change.generation
        )

    @_apply.register
    def _(self, change: SessionEnded) -> None:
        self._ledger.end_session(change.session_key)

    @_apply.register
    def _(self, change: WriterAttached) -> None:
        self._ledger.writer = (change.generation, change.pid, change.started_ticks)

    @_apply.register
    def _(self, change: QuotaSet) -> None:
        apply_quota(self._ledger, change.tenant, change.soft_blocks, change.hard_blocks)

    @_apply.register
    def _(self, change: Retained) -> None:
        apply_retained(self._ledger, change)

    @_apply.register
    def _(self, change: RetentionEnded) -> None:
        self._ledger.retentions.end(change.retention_id)

    @_apply.register
    def _(self, change: Flushed) -> None:
        apply_flush(self._ledger, change.block_ids.tolist())

    @_apply.register
    def _(self, change: PrefixPublished) -> None:
        self._ledger.retentions.publish(change.prefix_id, change.keys)

    @_apply.register
    def _(self, change: PrefixWithdrawn) -> None:
        self._ledger.retentions.withdraw(change.prefix_id)

    @_apply.register
    def _(self, change: StepApplied) -> None:
        ledger, books = self._ledger, self._ledger.sessions[change.session_key]
        ledger.acknowledge(books, change.acknowledged_step)
        rows, table = change.commit_rows, books.table
        table.num_computed[rows] = change.commit_num_computed_tokens
        # What steps in flight may write is not recorded; it is never less than what they wrote.
        table.num_reserved[rows] = np.maximum(table.num_reserved[rows], table.num_computed[rows])
        self._seal(books, change)
        for row, _ in change.releases.tolist():
            ledger.release(books, row)
        for fork in change.forks:
            ledger.fork(books, fork)
        self._take(books, change)
        for admission in change.admissions:
            self._admit(books, change.step, admission)
        books.last_applied_step = change.step
        self._pool.forget_idle_tenants()

    def _seal(self, books: SessionBooks, change: StepApplied) -> None:
        if not len(change.seals):
            return
        rows, indexes, stays = change.seals.T.tolist()
        keys = list(split_keys(change.seal_keys))
        parents = []
        if keys:
            found = self._ledger.parents_of_sealed(books.table, rows, indexes)
            parents = [parent or keys[which - 1] for which, parent in enumerate(found)]
        token_ids = np.frombuffer(change.seal_token_ids, "<i4")
        blocks = token_ids.reshape(-1, self._ledger.block_size)
        _expect(stays, self._ledger.seal(books.table, rows, indexes, parents, keys, blocks))

    def _take(self, books: SessionBooks, change: StepApplied) -> None:
        for row, index, block_id, source in change.takes.tolist():
            if source == APPENDED:
                (found,) = self._ledger.append(books.table, row, 1)
            else:
                found = self._ledger.copy_on_write(books, change.step, row, index)
            _expect(block_id, found)

    def _admit(self, books: SessionBooks, step: int, record: AdmissionRecord) -> None:
        new = NewSequence(
            record.row,
            record.incarnation,
            record.sequence_id,
            record.request_id,
            record.tenant,
            record.num_tokens,
            record.num_cached_tokens,
            record.block_table[: record.num_hit_blocks].tolist(),
            len(record.block_table) - record.num_hit_blocks,
            record.partial_source,
            list(split_keys(record.expected_keys)),
        )
        _expect(record.block_table.tolist(), self._ledger.admit(books, step, new).tolist())


def _expect(recorded: object, found: object) -> None:
    if recorded != found:
        message = f"the record says {recorded}, the state gives {found}"
        raise ValueError(message)
