"""Block tables of all sequences: what a step demands is decided here, in one order.

acknowledge, commit, release, fork, extend, admit. Scarcity is a refusal in the answer; a broken contract raises before
anything is applied. Every change is told as a record before the method that made it returns.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from memory_service.admission import Admitter
from memory_service.block_pool import BlockPool
from memory_service.demand import StepAnswer
from memory_service.demand_check import DemandCheck
from memory_service.ledger import Ledger
from memory_service.prefix_lookup import PrefixHit, PrefixLookup
from memory_service.record import (
    Record,
    ReleaseReason,
    SessionEnded,
    SessionOpened,
    StepApplied,
    WriterAttached,
)
from memory_service.retention import Retentions
from memory_service.sharing import Sharing
from memory_service.slots import SlotAllocator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from memory_service.block_hash import BlockHash, BlockHasher
    from memory_service.demand import IntArray, StepDemand
    from memory_service.record import Change
    from memory_service.sequence_table import SequenceTable
    from memory_service.session_books import SessionBooks


def _nobody_listens(_: Record) -> None:
    pass


def _raise(error: Exception) -> NoReturn:
    raise error


class BlockManager:
    """All sessions' sequences over one pool. Not thread-safe: one loop owns it.

    Args:
        num_blocks: blocks of the pool, the null block included.
        block_size: token slots a block.
        hasher: makes the keys of blocks.
        prefix_cache_enabled: whether full blocks are kept for reuse.
        min_partial_tokens: a partly matching block is copied at admission when it saves so many tokens; 0: never.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        hasher: BlockHasher,
        *,
        prefix_cache_enabled: bool = True,
        min_partial_tokens: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        pool = BlockPool(num_blocks, block_size)
        self.pool = pool
        self.block_size = block_size
        self.prefix_cache_enabled = prefix_cache_enabled
        self.ledger = Ledger(pool, block_size, hasher, prefix_cache_enabled, Retentions(pool))
        # The log comes first: nobody is told what it does not know.
        self.on_record: Callable[[Record], None] = _nobody_listens
        self.observers: list[Callable[[Record], None]] = []
        self.on_broken: Callable[[Exception], NoReturn] = _raise
        self.clock = clock
        self._slots = SlotAllocator(self.ledger)
        self._lookup = PrefixLookup(self.ledger, min_partial_tokens)
        self._admitter = Admitter(self.ledger, self._lookup)
        self.sharing = Sharing(self.ledger, self._lookup, self._changing, self._tell)

    @property
    def revision(self) -> int:
        """Rises with every change."""
        return self.ledger.revision

    @property
    def num_prefix_query_tokens(self) -> int:
        """Tokens of all admissions."""
        return self.ledger.counters.num_query_tokens

    @property
    def num_prefix_hit_tokens(self) -> int:
        """Those of them that the prefix cache had."""
        return self.ledger.counters.num_hit_tokens

    @property
    def sessions(self) -> Iterator[tuple[int, SessionBooks]]:
        """Session keys with what they hold."""
        return iter(self.ledger.sessions.items())

    @property
    def num_sequences(self) -> int:
        """Live sequences of all sessions."""
        return sum(len(found.table) for found in self.ledger.sessions.values())

    def table(self, session_key: int) -> SequenceTable:
        """The sequences of a session."""
        return self.ledger.sessions[session_key].table

    def probe(self, token_ids: IntArray, tenant: str) -> PrefixHit:
        """What an admission of these tokens would hit now. Touches nothing."""
        return self._lookup.find(token_ids, self.sharing.salt(tenant))

    # Sessions and writers

    def open_session(
        self, session_key: int, max_num_rows: int, session_id: str = "", generation: int = 1
    ) -> None:
        """Keep books for a new session, or note that a new stream resumes it."""
        with self._changing():
            self.ledger.open_session(session_key, session_id, max_num_rows, generation)
            self._tell(SessionOpened(session_key, session_id, max_num_rows, generation))

    def close_session(self, session_key: int) -> None:
        """Return all that the session holds."""
        with self._changing():
            self.ledger.end_session(session_key)
            self._tell(SessionEnded(session_key))

    def attach_writer(self, generation: int, pid: int, started_ticks: int) -> None:
        """A compute service was let in."""
        with self._changing():
            self.ledger.writer = (generation, pid, started_ticks)
            self._tell(WriterAttached(generation, pid, started_ticks))

    # Steps

    def apply(self, session_key: int, demand: StepDemand) -> StepAnswer:
        """Apply one step; raises `BrokenContract` before anything was changed."""
        books = self.ledger.sessions[session_key]
        DemandCheck(books.table, self.block_size).check(demand)
        with self._changing():
            return self._apply(session_key, books, demand)

    def _apply(self, session_key: int, books: SessionBooks, demand: StepDemand) -> StepAnswer:
        answer = StepAnswer(demand.step)
        num_copies = len(books.unacknowledged_copies)
        self.ledger.acknowledge(books, demand.acknowledged_step)
        is_quiet = num_copies == len(books.unacknowledged_copies)
        seals = self._commit_all(books.table, demand, answer)
        releases = self._release_all(books, demand, answer)
        for fork in demand.forks:
            answer.forked_tables.append((fork.dst_row, self.ledger.fork(books, fork)))
        takes = self._slots.extend_all(books, demand, answer)
        is_empty = self.num_sequences == 0
        admissions = self._admitter.admit_all(books, demand, answer, is_empty=is_empty)
        self.pool.forget_idle_tenants()
        answer.num_available_blocks = self.pool.num_available
        is_quiet &= not (len(demand.commit_rows) or releases or demand.forks or takes or admissions)
        if not is_quiet:
            books.last_applied_step = demand.step
            self._tell(
                StepApplied(
                    session_key,
                    demand.step,
                    demand.acknowledged_step,
                    demand.commit_rows,
                    demand.commit_num_computed_tokens,
                    *seals,
                    releases=_array(releases, 2),
                    forks=demand.forks,
                    takes=_array(takes, 4),
                    admissions=tuple(admissions),
                )
            )
        return answer

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A change that is made whole and told. One that fails half way leaves a state that no record tells of."""
        self.pool.begin_change(self.clock())
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- whatever it is, nobody may go on from there
            self.on_broken(error)

    def _tell(self, change: Change) -> None:
        self.ledger.revision += 1
        record = Record(self.ledger.revision, self.pool.now, change)
        self.on_record(record)
        for observer in self.observers:
            observer(record)

    def _commit_all(
        self, table: SequenceTable, demand: StepDemand, answer: StepAnswer
    ) -> tuple[IntArray, bytes, bytes]:
        """Take progress in and seal what became full; the seals, their keys and their token ids."""
        rows, size = demand.commit_rows, self.block_size
        first = table.num_computed[rows] // size
        end = demand.commit_num_computed_tokens // size
        table.num_computed[rows] = demand.commit_num_computed_tokens
        table.num_reserved[rows] = np.maximum(table.num_reserved[rows], table.num_computed[rows])
        full = np.flatnonzero(end > first)
        if not len(full):
            return _array([], 3), b"", b""
        counts = end[full] - first[full]
        sealed_rows = np.repeat(rows[full], counts).tolist()
        indexes = [
            index
            for begin, count in zip(first[full].tolist(), counts.tolist(), strict=True)
            for index in range(begin, begin + count)
        ]
        return self._seal(table, sealed_rows, indexes, demand.commit_token_ids, answer)

    def _seal(
        self,
        table: SequenceTable,
        rows: list[int],
        indexes: list[int],
        token_ids: IntArray,
        answer: StepAnswer,
    ) -> tuple[IntArray, bytes, bytes]:
        packed = token_ids.tobytes() if self.prefix_cache_enabled else b""
        parents, keys = self._keys(table, rows, indexes, packed) if packed else ([], [])
        before = table.entries[rows, indexes].tolist()
        blocks = token_ids.reshape(-1, self.block_size)
        stays = self.ledger.seal(table, rows, indexes, parents, keys, blocks)
        if stays != before:
            answer.remaps += [
                found
                for found, block_id in zip(
                    zip(rows, indexes, stays, strict=True), before, strict=True
                )
                if found[2] != block_id
            ]
        return np.array([rows, indexes, stays], dtype=np.int32).T, b"".join(keys), packed

    def _keys(
        self, table: SequenceTable, rows: list[int], indexes: list[int], packed: bytes
    ) -> tuple[list[BlockHash], list[BlockHash]]:
        """Keys of what precedes each entry, and of its block."""
        width, begin, next_key = 4 * self.block_size, 0, self._lookup.next_key
        parents: list[BlockHash] = []
        keys: list[BlockHash] = []
        for row, known in zip(
            rows, self.ledger.parents_of_sealed(table, rows, indexes), strict=True
        ):
            parent = known or keys[-1]
            parents.append(parent)
            keys.append(next_key(parent, packed[begin : begin + width], table[row].tenant.salt))
            begin += width
        return parents, keys

    def _release_all(
        self, books: SessionBooks, demand: StepDemand, answer: StepAnswer
    ) -> list[tuple[int, int]]:
        for row in demand.releases:
            self.ledger.release(books, row)
        if demand.releases and answer.remaps:
            # A released row may be used again in this very step: nobody must remap the newcomer.
            gone = set(demand.releases)
            answer.remaps = [found for found in answer.remaps if found[0] not in gone]
        reasons = demand.release_reasons or [ReleaseReason.UNSPECIFIED] * len(demand.releases)
        return [(row, reason.value) for row, reason in zip(demand.releases, reasons, strict=True)]


def _array(rows: Sequence[tuple[int, ...]], width: int) -> IntArray:
    return np.array(rows, dtype=np.int32).reshape(-1, width)
