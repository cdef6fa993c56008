"""Block tables of all sequences: what a step demands is applied here, in one order.

acknowledge, commit, release, fork, extend, admit. Scarcity is a refusal in the answer; a broken contract raises before
anything is applied.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from memory_service.admission import Admitter
from memory_service.block_pool import BlockPool
from memory_service.demand import StepAnswer
from memory_service.demand_check import DemandCheck
from memory_service.sequence_table import Sequence, SequenceTable
from memory_service.session_books import SessionBooks
from memory_service.slots import SlotAllocator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memory_service.block_hash import BlockHash, BlockHasher
    from memory_service.demand import Fork, IntArray, StepDemand


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
        self._hasher = hasher
        self._clock = clock
        self._slots = SlotAllocator(self.pool, block_size)
        self._admitter = Admitter(
            self.pool, block_size, hasher, clock, prefix_cache_enabled=prefix_cache_enabled
        )
        self._sessions: dict[int, SessionBooks] = {}

    @property
    def num_prefix_query_tokens(self) -> int:
        """Tokens of all admissions."""
        return self._admitter.num_query_tokens

    @property
    def num_prefix_hit_tokens(self) -> int:
        """Those of them that the prefix cache had."""
        return self._admitter.num_hit_tokens

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
        self._slots.extend_all(books, demand, answer)
        self._admitter.admit_all(books.table, demand, answer, is_empty=self.num_sequences == 0)
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
