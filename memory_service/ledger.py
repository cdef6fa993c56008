"""Every way in which the state of a pool changes. Nothing is decided here: the manager decides, a fold repeats.

Each method does the same to equal states, down to the order of the free list: that is what makes the fold of the records
equal the state that they tell of.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from memory_service.block_hash import PUBLIC_SALT, BlockHash, BlockHasher
from memory_service.record import AdmissionRecord
from memory_service.sequence_table import Sequence, SequenceTable
from memory_service.session_books import SessionBooks
from memory_service.tenants import PUBLIC_TENANT

if TYPE_CHECKING:
    from memory_service.block_pool import BlockPool
    from memory_service.demand import Fork, IntArray
    from memory_service.retention import Retentions

APPENDED: Final = 0  # in place of the source of a copy


@dataclass(slots=True)
class Counters:
    """What happened since the pool began."""

    num_query_tokens: int = 0  # of all admissions
    num_hit_tokens: int = 0  # those of them that the cache had
    num_partial_hit_tokens: int = 0  # those of them that a copy of a partly matching block had
    num_deduplicated_blocks: int = 0


@dataclass(frozen=True, slots=True)
class NewSequence:
    """What is known of a sequence when it comes in."""

    row: int
    incarnation: int
    sequence_id: str
    request_id: str
    tenant: str
    num_tokens: int
    num_cached_tokens: int
    hit_block_ids: list[int]
    num_new_blocks: int
    partial_source: int  # block whose copy the first new block begins with; 0 for none
    expected_keys: list[BlockHash]

    def record(self, block_table: IntArray, expected_keys: bytes) -> AdmissionRecord:
        """What is written down of its admission."""
        return AdmissionRecord(
            self.row,
            self.incarnation,
            self.sequence_id,
            self.request_id,
            self.tenant,
            self.num_tokens,
            self.num_cached_tokens,
            len(self.hit_block_ids),
            block_table,
            self.partial_source,
            expected_keys,
        )


@dataclass(slots=True)
class Ledger:
    """The state of one pool: blocks, sessions with their tables, tenants, retentions, published prefixes."""

    pool: BlockPool
    block_size: int
    hasher: BlockHasher
    prefix_cache_enabled: bool
    retentions: Retentions
    revision: int = 0
    sessions: dict[int, SessionBooks] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    last_session_key: int = 0
    last_generation: int = 0  # of any session
    writer: tuple[int, int, int] = (0, 0, 0)  # generation, pid, start of the process

    # Sessions

    def open_session(
        self, session_key: int, session_id: str, max_num_rows: int, generation: int
    ) -> None:
        """A session begins, or a new stream resumes it."""
        books = self.sessions.get(session_key)
        if books is None:
            table = SequenceTable(max_num_rows)
            books = self.sessions[session_key] = SessionBooks(session_id, table)
        books.generation = generation
        self.last_session_key = max(self.last_session_key, session_key)
        self.last_generation = max(self.last_generation, generation)

    def end_session(self, session_key: int) -> None:
        """Return all that the session holds."""
        books = self.sessions[session_key]
        for row in [row for row, _ in books.table.items()]:
            self.release(books, row)
        for _, source in books.unacknowledged_copies:
            self.pool.unpin(source)
        del self.sessions[session_key]
        self.pool.forget_idle_tenants()

    def acknowledge(self, books: SessionBooks, step: int) -> None:
        """The copies up to `step` were made."""
        copies = books.unacknowledged_copies
        while copies and copies[0][0] <= step:
            self.pool.unpin(copies.popleft()[1])

    # Sequences

    def seal(
        self,
        table: SequenceTable,
        rows: list[int],
        indexes: list[int],
        parents: list[BlockHash],
        keys: list[BlockHash],
        token_ids: IntArray,
    ) -> list[int]:
        """Table entries are full and acknowledged, a row's in order; the blocks that stay there, be they older ones.

        Args:
            table: the session's.
            rows: of the entries.
            indexes: of the entries.
            parents: keys of what precedes them; empty without a prefix cache.
            keys: of their blocks, likewise.
            token_ids: `[len(rows), block_size]`, likewise.
        """
        block_ids: list[int] = table.entries[rows, indexes].tolist()
        self.pool.sealed[block_ids] = True
        if not self.prefix_cache_enabled:
            return block_ids
        self.pool.index.token_ids[block_ids] = token_ids
        return [
            self._seal(table, *found)
            for found in zip(rows, indexes, block_ids, parents, keys, strict=True)
        ]

    def parents_of_sealed(
        self, table: SequenceTable, rows: list[int], indexes: list[int]
    ) -> list[BlockHash | None]:
        """The key of what precedes each entry; None when that is sealed along with it, as the entry before."""
        before = table.entries[rows, [index - 1 for index in indexes]].tolist()
        return [
            self.pool.index.key_of(block_id) if index else self.hasher.root
            for index, block_id in zip(indexes, before, strict=True)
        ]

    def _seal(
        self,
        table: SequenceTable,
        row: int,
        index: int,
        block_id: int,
        parent: BlockHash,
        key: BlockHash,
    ) -> int:
        prefixes, sequence = self.pool.index, table[row]
        if sequence.expected_keys:
            prefixes.end(sequence.expected_keys[:1])
            del sequence.expected_keys[:1]
        if prefixes.key_of(block_id) is not None:
            return block_id  # another holder of the block has said what it is
        original = prefixes.find(key)
        if original:
            self._replace(table, row, index, original)
            return original
        is_public = key in self.retentions.public_keys
        salt = PUBLIC_SALT if is_public else sequence.tenant.salt
        prefixes.add(key, self.hasher.lineage(parent, salt), block_id)
        if is_public:
            # Who happened to compute what all share does not pay for it.
            self.pool.move_home(block_id, self.pool.tenant(PUBLIC_TENANT).homes[0])
        if sequence.retention is not None:
            self.retentions.sealed(sequence.retention, block_id)
        return block_id

    def _replace(self, table: SequenceTable, row: int, index: int, block_id: int) -> None:
        """Let a table entry name `block_id` in place of its duplicate."""
        self.pool.acquire(block_id)
        self.pool.release(int(table.entries[row, index]))
        table.entries[row, index] = block_id
        self.counters.num_deduplicated_blocks += 1

    def release(self, books: SessionBooks, row: int) -> None:
        """The sequence in `row` ends; the tail of its table is evicted before the head."""
        for block_id in reversed(books.table.block_table(row).tolist()):
            self.pool.release(block_id)
        sequence = books.table.remove(row)
        self.pool.index.end(sequence.expected_keys)
        sequence.tenant.num_sequences -= 1
        self.pool.note_idle(sequence.tenant)

    def fork(self, books: SessionBooks, fork: Fork) -> IntArray:
        """A sequence begins that shares another one's blocks; its table."""
        table, parent = books.table, books.table[fork.src_row]
        num_blocks = -(-fork.num_tokens // self.block_size)
        shared = table.block_table(fork.src_row)[:num_blocks]
        for block_id in shared.tolist():
            self.pool.acquire(block_id)
        child = Sequence(
            fork.sequence_id,
            fork.request_id,
            parent.tenant,
            fork.dst_incarnation,
            parent.num_cached_tokens,
            self.pool.now,
            retention=parent.retention,
        )
        child.tenant.num_sequences += 1
        num_computed = min(int(table.num_computed[fork.src_row]), fork.num_tokens)
        table.add(fork.dst_row, child, shared, num_computed)
        return shared

    def append(self, table: SequenceTable, row: int, count: int) -> list[int]:
        """The row's table grows by `count` blocks; their ids."""
        tenant = table[row].tenant
        block_ids = [self.pool.allocate(tenant) for _ in range(count)]
        table.append(row, block_ids)
        return block_ids

    def append_each(self, table: SequenceTable, rows: list[int]) -> list[int]:
        """The table of each of these rows grows by a block; their ids. The same as `append` of one after the other."""
        allocate = self.pool.allocate
        block_ids = [allocate(table[row].tenant) for row in rows]
        table.append_each(rows, block_ids)
        return block_ids

    def copy_on_write(self, books: SessionBooks, step: int, row: int, index: int) -> int:
        """The row's entry `index`, shared with others, becomes a copy of its own; the new block."""
        table = books.table
        source = int(table.entries[row, index])
        target = self.pool.allocate(table[row].tenant)
        self._pin_source(books, step, source)
        self.pool.release(source)
        table.entries[row, index] = target
        return target

    def _pin_source(self, books: SessionBooks, step: int, source: int) -> None:
        self.pool.pin(source)
        books.unacknowledged_copies.append((step, source))

    def admit(self, books: SessionBooks, step: int, new: NewSequence) -> IntArray:
        """A sequence comes in; its table."""
        pool, tenant = self.pool, self.pool.tenant(new.tenant)
        for block_id in new.hit_block_ids:
            pool.acquire(block_id)
        if new.partial_source:
            # Before anything is given out: it must not be evicted for the very sequence that copies it.
            self._pin_source(books, step, new.partial_source)
        new_ids = [pool.allocate(tenant) for _ in range(new.num_new_blocks)]
        block_table = np.array(new.hit_block_ids + new_ids, dtype=np.int32)
        sequence = Sequence(
            new.sequence_id,
            new.request_id,
            tenant,
            new.incarnation,
            new.num_cached_tokens,
            pool.now,
            expected_keys=new.expected_keys,
        )
        tenant.num_sequences += 1
        pool.index.begin(new.expected_keys)
        books.table.add(new.row, sequence, block_table, new.num_cached_tokens)
        self._count_admission(new)
        return block_table

    def _count_admission(self, new: NewSequence) -> None:
        counters = self.counters
        counters.num_query_tokens += new.num_tokens
        counters.num_hit_tokens += new.num_cached_tokens
        num_shared = len(new.hit_block_ids) * self.block_size
        counters.num_partial_hit_tokens += new.num_cached_tokens - num_shared
