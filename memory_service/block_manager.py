"""Block tables of all sequences: what a step demands is applied here, in one order.

acknowledge, commit, release, fork, extend, admit. Scarcity is a refusal in the answer; a broken contract raises before
anything is applied.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from memory_service.block_pool import BlockPool
from memory_service.demand import Admission, RefusalReason, StepAnswer
from memory_service.demand_check import DemandCheck
from memory_service.sequence_table import Sequence, SequenceTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memory_service.block_hash import BlockHash, BlockHasher
    from memory_service.demand import Admit, Fork, IntArray, StepDemand


@dataclass(slots=True)
class SessionBooks:
    """What one session holds."""

    table: SequenceTable
    unacknowledged_copies: deque[tuple[int, int]] = field(default_factory=deque)  # (step, source)


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The part of a sequence that the cache has."""

    block_ids: list[int]
    missing_keys: list[BlockHash]  # of the full blocks behind it


class BlockManager:
    """All sessions' sequences over one pool. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        hasher: BlockHasher,
        *,
        prefix_cache_enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.prefix_cache_enabled = prefix_cache_enabled
        self.revision = 0  # rises with every change
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0
        self._hasher = hasher
        self._clock = clock
        self._sessions: dict[int, SessionBooks] = {}

    @property
    def sessions(self) -> Iterator[tuple[int, SessionBooks]]:
        """Session keys with what they hold."""
        return iter(self._sessions.items())

    @property
    def num_sequences(self) -> int:
        """Live sequences of all sessions."""
        return sum(len(found.table) for found in self._sessions.values())

    def table(self, session_key: int) -> SequenceTable:
        """The sequences of a session."""
        return self._sessions[session_key].table

    def open_session(self, session_key: int, max_num_rows: int) -> None:
        """Keep books for a new session."""
        self._sessions[session_key] = SessionBooks(SequenceTable(max_num_rows))
        self.revision += 1

    def close_session(self, session_key: int) -> None:
        """Return all that the session holds."""
        books = self._sessions[session_key]
        for row in [row for row, _ in books.table.items()]:
            self._release(books, row)
        for _, source in books.unacknowledged_copies:
            self.pool.unpin(source)
        del self._sessions[session_key]
        self.revision += 1

    def apply(self, session_key: int, demand: StepDemand) -> StepAnswer:
        """Apply one step; raises `BrokenContract` before anything was changed."""
        books = self._sessions[session_key]
        DemandCheck(books.table, self.block_size).check(demand)
        answer = StepAnswer(demand.step)
        self._acknowledge(books, demand.acknowledged_step)
        self._commit_all(books, demand, answer)
        self._release_all(books, demand, answer)
        for fork in demand.forks:
            answer.forked_tables.append((fork.dst_row, self._fork(books.table, fork)))
        self._extend_all(books, demand, answer)
        self._admit_all(books, demand, answer)
        answer.num_available_blocks = self.pool.num_available
        self.revision += 1
        return answer

    # Acknowledge

    def _acknowledge(self, books: SessionBooks, step: int) -> None:
        copies = books.unacknowledged_copies
        while copies and copies[0][0] <= step:
            self.pool.unpin(copies.popleft()[1])

    # Commit

    def _commit_all(self, books: SessionBooks, demand: StepDemand, answer: StepAnswer) -> None:
        table, rows = books.table, demand.commit_rows
        first = table.num_computed[rows] // self.block_size
        end = demand.commit_num_computed_tokens // self.block_size
        table.num_computed[rows] = demand.commit_num_computed_tokens
        bounds = np.concatenate([[0], np.cumsum(end - first)]) * self.block_size
        for which in np.flatnonzero(end > first).tolist():
            row, begin = int(rows[which]), int(first[which])
            token_ids = demand.commit_token_ids[bounds[which] : bounds[which + 1]]
            remaps = self._seal(table, row, begin, int(end[which]), token_ids)
            answer.remaps += [(row, index, block_id) for index, block_id in remaps]

    def _seal(
        self, table: SequenceTable, row: int, begin: int, end: int, token_ids: IntArray
    ) -> Iterator[tuple[int, int]]:
        """Seal the row's blocks `[begin, end)`; yields (index, block) where a duplicate was found."""
        sequence = table[row]
        self._forget_expected(sequence, end - begin)
        for index in range(begin, end):
            block_id = int(table.entries[row, index])
            self.pool.sealed[block_id] = True
            if self.prefix_cache_enabled:
                at = (index - begin) * self.block_size
                parent = sequence.keys[-1] if sequence.keys else None
                key = self._hasher.key(parent, token_ids[at : at + self.block_size].tobytes())
                sequence.keys.append(key)
                original = self._index(key, block_id)
                if original != block_id:
                    self._replace(table, row, index, original)
                    yield index, original

    def _forget_expected(self, sequence: Sequence, count: int) -> None:
        filled = sequence.expected_keys[:count]
        self.pool.index.end(filled)
        del sequence.expected_keys[:count]

    def _index(self, key: BlockHash, block_id: int) -> int:
        """The block that answers for `key`: `block_id`, unless another one did before."""
        original = self.pool.index.find(key)
        if original is None:
            self.pool.index.add(key, block_id)
            return block_id
        return original

    def _replace(self, table: SequenceTable, row: int, index: int, block_id: int) -> None:
        """Let a table entry name `block_id` in place of its duplicate."""
        self.pool.acquire(block_id)
        self.pool.release(int(table.entries[row, index]))
        table.entries[row, index] = block_id

    # Release

    def _release_all(self, books: SessionBooks, demand: StepDemand, answer: StepAnswer) -> None:
        for row in demand.releases:
            self._release(books, row)
        if demand.releases:
            # A released row may be used again in this very step: nobody must remap the newcomer.
            gone = set(demand.releases)
            answer.remaps = [found for found in answer.remaps if found[0] not in gone]

    def _release(self, books: SessionBooks, row: int) -> None:
        for block_id in reversed(books.table.block_table(row).tolist()):
            self.pool.release(block_id)
        sequence = books.table.remove(row)
        self.pool.index.end(sequence.expected_keys)

    # Fork

    def _fork(self, table: SequenceTable, fork: Fork) -> IntArray:
        parent = table[fork.src_row]
        num_blocks = -(-fork.num_tokens // self.block_size)
        shared = table.block_table(fork.src_row)[:num_blocks]
        for block_id in shared.tolist():
            self.pool.acquire(block_id)
        num_computed = min(int(table.num_computed[fork.src_row]), fork.num_tokens)
        child = Sequence(
            fork.sequence_id,
            fork.request_id,
            fork.dst_incarnation,
            parent.num_cached_tokens,
            self._clock(),
            keys=parent.keys[: num_computed // self.block_size],
        )
        table.add(fork.dst_row, child, shared, num_computed)
        return shared

    # Extend

    def _extend_all(self, books: SessionBooks, demand: StepDemand, answer: StepAnswer) -> None:
        """Give every extended row its slots; most rows need none, and are passed without a loop."""
        table, rows = books.table, demand.extend_rows
        ends = demand.extend_starts + demand.extend_num_tokens
        missing = np.maximum(0, -(-ends // self.block_size) - table.num_blocks[rows])
        shared = self._shared_entries(table, rows, demand.extend_starts)
        for which in np.flatnonzero((missing > 0) | (shared >= 0)).tolist():
            row = int(rows[which])
            # The last holder of a shared block writes in place: earlier rows of this loop may have left it alone.
            index = int(
                self._shared_entries(table, rows[[which]], demand.extend_starts[[which]])[0]
            )
            needed = int(missing[which]) + (index >= 0)
            if answer.refusals or needed > self.pool.num_available:
                # Nobody less urgent overtakes; those who need nothing run on.
                answer.refusals += [(row, RefusalReason.NO_BLOCKS)] if needed else []
                continue
            if index >= 0:
                self._copy_on_write(books, demand.step, row, index, answer)
            self._append(table, row, int(missing[which]), answer)

    def _shared_entries(self, table: SequenceTable, rows: IntArray, starts: IntArray) -> IntArray:
        """The table entry that each row writes first, where another table holds the block too; else -1."""
        indexes = starts // self.block_size
        present = indexes < table.num_blocks[rows]
        blocks = table.entries[rows, np.where(present, indexes, 0)]
        shared = present & (self.pool.ref_counts[blocks] > 1)
        return np.where(shared, indexes, -1).astype(np.int32)

    def _copy_on_write(
        self, books: SessionBooks, step: int, row: int, index: int, answer: StepAnswer
    ) -> None:
        source = int(books.table.entries[row, index])
        target = self.pool.allocate()
        self.pool.pin(source)
        self.pool.release(source)
        books.table.entries[row, index] = target
        books.unacknowledged_copies.append((step, source))
        answer.copies.append((source, target))
        answer.remaps.append((row, index, target))

    def _append(self, table: SequenceTable, row: int, count: int, answer: StepAnswer) -> None:
        block_ids = [self.pool.allocate() for _ in range(count)]
        table.append(row, block_ids)
        answer.new_blocks += [(row, block_id) for block_id in block_ids]

    # Admit

    def _admit_all(self, books: SessionBooks, demand: StepDemand, answer: StepAnswer) -> None:
        budget = demand.admit_token_budget
        is_full = bool(answer.refusals)  # a running sequence lacks blocks: nobody new comes in
        for admit in demand.admits:
            reason = (
                RefusalReason.NO_BLOCKS
                if is_full
                else self._admit(books.table, admit, budget, demand.watermark_blocks, answer)
            )
            if reason is None:
                budget -= answer.admissions[-1].num_scheduled_tokens
            else:
                is_full = reason is RefusalReason.NO_BLOCKS
                answer.refusals.append((admit.row, reason))

    def _admit(
        self,
        table: SequenceTable,
        admit: Admit,
        budget: int,
        watermark_blocks: int,
        answer: StepAnswer,
    ) -> RefusalReason | None:
        if budget < 1:
            return RefusalReason.TOKEN_BUDGET
        hit = self._find_prefix(admit.token_ids)
        if hit.missing_keys and self.pool.index.is_in_progress(hit.missing_keys[0]):
            return RefusalReason.PREFIX_IN_PROGRESS
        if not self._fits(admit, hit, watermark_blocks):
            return RefusalReason.NO_BLOCKS
        answer.admissions.append(self._start(table, admit, hit, budget))
        return None

    def _find_prefix(self, token_ids: IntArray) -> PrefixHit:
        """Leading full blocks in the cache; at least one token is left to run."""
        if not self.prefix_cache_enabled:
            return PrefixHit([], [])
        keys = list(self._hasher.chain(None, token_ids[:-1], self.block_size))
        block_ids: list[int] = []
        for key in keys:
            block_id = self.pool.index.find(key)
            if block_id is None:
                break
            block_ids.append(block_id)
        return PrefixHit(block_ids, keys[len(block_ids) :])

    def _fits(self, admit: Admit, hit: PrefixHit, watermark_blocks: int) -> bool:
        """Whether all known tokens, and the siblings' first copies, would find blocks and leave the watermark."""
        num_blocks = -(-len(admit.token_ids) // self.block_size) + admit.num_sequences - 1
        needed = num_blocks - len(hit.block_ids) + self.pool.num_unheld(hit.block_ids)
        # Alone in the pool nobody is served by waiting.
        left_over = watermark_blocks if self.num_sequences else 0
        return needed + left_over <= self.pool.num_available

    def _start(self, table: SequenceTable, admit: Admit, hit: PrefixHit, budget: int) -> Admission:
        num_tokens = len(admit.token_ids)
        num_cached = len(hit.block_ids) * self.block_size
        num_scheduled = min(num_tokens - num_cached, budget)
        for block_id in hit.block_ids:
            self.pool.acquire(block_id)
        num_new = -(-(num_cached + num_scheduled) // self.block_size) - len(hit.block_ids)
        new_ids = [self.pool.allocate() for _ in range(num_new)]
        block_table = np.array(hit.block_ids + new_ids, dtype=np.int32)
        keys = [key for block in hit.block_ids if (key := self.pool.index.key_of(block))]
        sequence = Sequence(
            admit.sequence_id,
            admit.request_id,
            admit.incarnation,
            num_cached,
            self._clock(),
            keys=keys,
            expected_keys=hit.missing_keys,
        )
        self.pool.index.begin(hit.missing_keys)
        table.add(admit.row, sequence, block_table, num_cached)
        self.num_prefix_query_tokens += num_tokens
        self.num_prefix_hit_tokens += num_cached
        return Admission(admit.row, num_cached, num_scheduled, block_table)
