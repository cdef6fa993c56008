"""Slots for the tokens that a step runs: table entries appended, shared ones copied before they are written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memory_service.demand import RefusalReason

if TYPE_CHECKING:
    from memory_service.block_pool import BlockPool
    from memory_service.demand import IntArray, StepAnswer, StepDemand
    from memory_service.sequence_table import SequenceTable
    from memory_service.session_books import SessionBooks


class SlotAllocator:
    """Gives running sequences their slots."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size

    def extend_all(self, books: SessionBooks, demand: StepDemand, answer: StepAnswer) -> None:
        """Give every extended row its slots; most rows need none, and are passed without a loop."""
        table, rows, starts = books.table, demand.extend_rows, demand.extend_starts
        ends = starts + demand.extend_num_tokens
        missing = np.maximum(0, -(-ends // self._block_size) - table.num_blocks[rows])
        shared = self._num_shared(table, rows, starts, ends)
        for which in np.flatnonzero((missing > 0) | (shared > 0)).tolist():
            row = int(rows[which])
            # The last holder of a shared block writes in place: earlier rows of this loop may have left it alone.
            entries = self._shared_entries(table, row, int(starts[which]), int(ends[which]))
            needed = int(missing[which]) + len(entries)
            if answer.refusals or needed > self._pool.num_available:
                # Nobody less urgent overtakes; those who need nothing run on.
                answer.refusals += [(row, RefusalReason.NO_BLOCKS)] if needed else []
                continue
            for index in entries:
                self._copy_on_write(books, demand.step, row, index, answer)
            self._append(table, row, int(missing[which]), answer)
        self._check_writes(books, demand, answer)

    def _num_shared(
        self, table: SequenceTable, rows: IntArray, starts: IntArray, ends: IntArray
    ) -> IntArray:
        """How many blocks that each row would write are held by another table too."""
        owners, blocks = self._written(table, rows, starts, ends)
        shared = self._pool.ref_counts[blocks] > 1
        return np.bincount(owners[shared], minlength=len(rows)).astype(np.int32)

    def _written(
        self, table: SequenceTable, rows: IntArray, starts: IntArray, ends: IntArray
    ) -> tuple[IntArray, IntArray]:
        """The blocks in the tables now that cover `[start, end)` of each row, and which row each belongs to."""
        first = starts // self._block_size
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
        shared = self._pool.ref_counts[table.entries[row, first : max(first, last)]] > 1
        return [first + int(offset) for offset in np.flatnonzero(shared)]

    def _copy_on_write(
        self, books: SessionBooks, step: int, row: int, index: int, answer: StepAnswer
    ) -> None:
        source = int(books.table.entries[row, index])
        target = self._pool.allocate()
        self._pool.pin(source)
        self._pool.release(source)
        books.table.entries[row, index] = target
        books.unacknowledged_copies.append((step, source))
        answer.copies.append((source, target))
        answer.remaps.append((row, index, target))

    def _append(self, table: SequenceTable, row: int, count: int, answer: StepAnswer) -> None:
        block_ids = [self._pool.allocate() for _ in range(count)]
        table.append(row, block_ids)
        answer.new_blocks += [(row, block_id) for block_id in block_ids]

    def _check_writes(self, books: SessionBooks, demand: StepDemand, answer: StepAnswer) -> None:
        """No slot that the step writes lies in a sealed block or in one that two tables hold."""
        refused = [row for row, _ in answer.refusals]
        runs = ~np.isin(demand.extend_rows, refused)
        starts = demand.extend_starts[runs]
        ends = starts + demand.extend_num_tokens[runs]
        _, blocks = self._written(books.table, demand.extend_rows[runs], starts, ends)
        wrong = (self._pool.ref_counts[blocks] != 1) | self._pool.sealed[blocks]
        if wrong.any():
            raise RuntimeError(
                f"step {demand.step} would write block {blocks[wrong][0]}, which it may not"
            )
