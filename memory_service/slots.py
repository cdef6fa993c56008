"""Slots for the tokens that a step runs: table entries appended, shared ones copied before they are written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memory_service.demand import RefusalReason, Shortage
from memory_service.ledger import APPENDED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memory_service.demand import IntArray, StepAnswer, StepDemand
    from memory_service.ledger import Ledger
    from memory_service.sequence_table import SequenceTable
    from memory_service.session_books import SessionBooks


class SlotAllocator:
    """Gives running sequences their slots."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._pool = ledger.pool
        self._block_size = ledger.block_size

    def extend_all(
        self, books: SessionBooks, demand: StepDemand, answer: StepAnswer
    ) -> list[tuple[int, int, int, int]]:
        """Give every extended row its slots; most rows need none, and are passed without a loop.

        Returns (row, index, block, source) of every table entry that changed; the source is `APPENDED` for a new one.
        """
        table, rows, starts = books.table, demand.extend_rows, demand.extend_starts
        ends = starts + demand.extend_num_tokens
        missing = np.maximum(0, -(-ends // self._block_size) - table.num_blocks[rows])
        shared = self._num_shared(table, rows, starts, ends)
        wanting = np.flatnonzero((missing > 0) | (shared > 0))
        if self._is_plenty(missing[wanting], shared[wanting]):
            takes = self._append_each(table, rows[wanting].tolist(), answer)
        else:
            takes = []
            for which in wanting.tolist():
                needs = (int(found[which]) for found in (rows, missing, shared, starts, ends))
                takes += self._extend(books, demand.step, answer, *needs)
        runs = self._check_writes(books, demand, answer)
        table.num_reserved[rows[runs]] = ends[runs]
        return takes

    def _is_plenty(self, missing: IntArray, shared: IntArray) -> bool:
        """Whether every row that wants anything wants one new block, and gets it."""
        pool = self._pool
        is_plain = not shared.any() and (missing == 1).all() and not pool.has_quotas
        return bool(is_plain and len(missing) <= pool.num_available)

    def _append_each(
        self, table: SequenceTable, rows: list[int], answer: StepAnswer
    ) -> list[tuple[int, int, int, int]]:
        indexes = table.num_blocks[rows].tolist()
        block_ids = self._ledger.append_each(table, rows)
        answer.new_blocks += zip(rows, block_ids, strict=True)
        return [
            (row, index, block_id, APPENDED)
            for row, index, block_id in zip(rows, indexes, block_ids, strict=True)
        ]

    def _extend(
        self,
        books: SessionBooks,
        step: int,
        answer: StepAnswer,
        row: int,
        num_missing: int,
        num_shared: int,
        start: int,
        end: int,
    ) -> list[tuple[int, int, int, int]]:
        table = books.table
        # The last holder of a shared block writes in place: rows before this one may have left it alone.
        entries = self._shared_entries(table, row, start, end) if num_shared else []
        shortage = self._find_shortage(table, row, num_missing + len(entries), answer)
        if shortage is not None:
            answer.refuse(row, shortage)
            return []
        takes = [self._copy(books, step, row, index, answer) for index in entries]
        return takes + self._append(table, row, num_missing, answer)

    def _find_shortage(
        self, table: SequenceTable, row: int, num_needed: int, answer: StepAnswer
    ) -> Shortage | None:
        """Why the row does not get its blocks; nobody less urgent overtakes, those who need nothing run on."""
        if not num_needed:
            return None
        if not answer.shortages and num_needed <= self._pool.num_available_to(table[row].tenant):
            return None
        sequence = table[row]
        tenant, reason = sequence.tenant, None
        if any(found.reason is RefusalReason.NO_BLOCKS for found in answer.shortages):
            reason = RefusalReason.NO_BLOCKS
        elif any(found.tenant == tenant.name for found in answer.shortages):
            reason = RefusalReason.OVER_QUOTA
        elif num_needed > self._pool.num_available:
            reason = RefusalReason.NO_BLOCKS
        elif num_needed > self._pool.num_available_to(tenant):
            reason = self._quota_reason(table, row, num_needed)
        if reason is None:
            return None
        available = self._pool.num_available_to(tenant)
        names = (sequence.sequence_id, sequence.request_id, tenant.name)
        return Shortage(*names, reason, num_needed, available)

    def _quota_reason(self, table: SequenceTable, row: int, num_needed: int) -> RefusalReason:
        tenant = table[row].tenant
        assert tenant.hard_blocks is not None
        homes = self._pool.home_ids[table.entries[row, : table.num_blocks[row]]]
        num_own = int(np.isin(homes, [home.home_id for home in tenant.homes.values()]).sum())
        if num_own + num_needed > tenant.hard_blocks:
            return RefusalReason.LARGER_THAN_QUOTA
        return RefusalReason.OVER_QUOTA

    def _num_shared(
        self, table: SequenceTable, rows: IntArray, starts: IntArray, ends: IntArray
    ) -> IntArray:
        """How many blocks that each row would write are held by another table too, or sealed by one that is gone."""
        owners, blocks = self._written(table, rows, starts, ends)
        shared = (self._pool.ref_counts[blocks] > 1) | self._pool.sealed[blocks]
        return np.bincount(owners[shared], minlength=len(rows)).astype(np.int32)

    def _written(
        self, table: SequenceTable, rows: IntArray, starts: IntArray, ends: IntArray
    ) -> tuple[NDArray[np.signedinteger[Any]], IntArray]:
        """The blocks in the tables now that cover `[start, end)` of each row, and which row each belongs to."""
        first = starts // self._block_size
        if int((ends - starts).max(initial=0)) == 1:
            # Nothing but decodes: a block each, unless it is not there yet.
            owners = (first < table.num_blocks[rows]).nonzero()[0]
            return owners, table.entries[rows[owners], first[owners]]
        last = np.minimum(-(-ends // self._block_size), table.num_blocks[rows])
        counts = np.maximum(0, last - first)
        owners = np.repeat(np.arange(len(rows), dtype=np.int32), counts)
        offsets = np.arange(len(owners), dtype=np.int32) - np.repeat(
            np.cumsum(counts, dtype=np.int32) - counts, counts
        )
        return owners, table.entries[rows[owners], first[owners] + offsets]

    def _shared_entries(self, table: SequenceTable, row: int, start: int, end: int) -> list[int]:
        first = start // self._block_size
        last = min(-(-end // self._block_size), int(table.num_blocks[row]))
        blocks = table.entries[row, first : max(first, last)]
        shared = (self._pool.ref_counts[blocks] > 1) | self._pool.sealed[blocks]
        return [first + int(offset) for offset in np.flatnonzero(shared)]

    def _copy(
        self, books: SessionBooks, step: int, row: int, index: int, answer: StepAnswer
    ) -> tuple[int, int, int, int]:
        source = int(books.table.entries[row, index])
        target = self._ledger.copy_on_write(books, step, row, index)
        answer.copies.append((source, target))
        answer.remaps.append((row, index, target))
        return row, index, target, source

    def _append(
        self, table: SequenceTable, row: int, count: int, answer: StepAnswer
    ) -> list[tuple[int, int, int, int]]:
        first = int(table.num_blocks[row])
        block_ids = self._ledger.append(table, row, count)
        answer.new_blocks += [(row, block_id) for block_id in block_ids]
        return [(row, index, block_id, APPENDED) for index, block_id in enumerate(block_ids, first)]

    def _check_writes(
        self, books: SessionBooks, demand: StepDemand, answer: StepAnswer
    ) -> NDArray[np.bool_]:
        """No slot that the step writes lies in a sealed block or in one that two tables hold; which rows run."""
        runs = np.ones(len(demand.extend_rows), dtype=np.bool_)
        if answer.refusals:
            runs = ~np.isin(demand.extend_rows, [row for row, _ in answer.refusals])
        starts = demand.extend_starts[runs]
        ends = starts + demand.extend_num_tokens[runs]
        _, blocks = self._written(books.table, demand.extend_rows[runs], starts, ends)
        wrong = (self._pool.ref_counts[blocks] != 1) | self._pool.sealed[blocks]
        if wrong.any():
            raise RuntimeError(
                f"step {demand.step} would write block {blocks[wrong][0]}, which it may not"
            )
        return runs
