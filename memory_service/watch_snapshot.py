"""The whole state as a watcher gets it first: copied in one go, told in parts while the books move on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from memory_service.block_view import block_states
from memory_service.watched_change import (
    WatchedCounts,
    WatchedSequence,
    WatchedTenant,
    watched_tenants,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from memory_service.block_manager import BlockManager
    from memory_service.demand import IntArray

# A part stays far below 1 MiB, and a message of it is made within a millisecond.
_MAX_RUNS: Final = 1024
_MAX_TABLE_ENTRIES: Final = 8192
_BLOCKS_AT_ONCE: Final = 1 << 17

BlockRun = tuple[int, int, int, int]  # first block, blocks, state, reference count


@dataclass(frozen=True, slots=True)
class SnapshotPart:
    """A part of a snapshot; the last one brings all that is told once."""

    block_runs: list[BlockRun] = field(default_factory=list)
    sequences: list[WatchedSequence] = field(default_factory=list)
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state at one revision."""

    revision: int
    block_size: int
    states: NDArray[np.uint8]
    ref_counts: IntArray
    sequences: list[WatchedSequence]
    counts: WatchedCounts
    tenants: list[WatchedTenant]

    @classmethod
    def of(cls, manager: BlockManager) -> Snapshot:
        """A copy of the state as it is."""
        now = manager.clock()
        return cls(
            manager.revision,
            manager.block_size,
            block_states(manager.pool),
            manager.pool.ref_counts.copy(),
            [
                WatchedSequence.of(books.session_id, row, books.table, now)
                for _, books in manager.sessions
                for row, _ in books.table.items()
            ],
            WatchedCounts.of(manager),
            list(watched_tenants(manager).values()),
        )

    def parts(self) -> Iterator[SnapshotPart]:
        """All of it, in parts of bounded size: blocks, then sequences, then what is told once."""
        for runs in self._runs_at_once():
            yield SnapshotPart(block_runs=runs)
        for sequences in self._sequences_at_once():
            yield SnapshotPart(sequences=sequences)
        yield SnapshotPart(is_last=True)

    def _runs_at_once(self) -> Iterator[list[BlockRun]]:
        at_once: list[BlockRun] = []
        for begin in range(0, len(self.states), _BLOCKS_AT_ONCE):
            runs = self._runs(begin, min(begin + _BLOCKS_AT_ONCE, len(self.states)))
            for first in range(0, len(runs), _MAX_RUNS):
                more = [tuple(run) for run in runs[first : first + _MAX_RUNS].tolist()]
                if len(at_once) + len(more) > _MAX_RUNS:
                    yield at_once
                    at_once = []
                at_once += more
        yield at_once

    def _runs(self, begin: int, end: int) -> IntArray:
        """Runs of blocks that are alike, a row each."""
        states, ref_counts = self.states[begin:end], self.ref_counts[begin:end]
        differs = (states[1:] != states[:-1]) | (ref_counts[1:] != ref_counts[:-1])
        firsts = np.concatenate([[0], np.flatnonzero(differs) + 1])
        lengths = np.diff(firsts, append=end - begin)
        columns = [firsts + begin, lengths, states[firsts], ref_counts[firsts]]
        return np.array(columns, dtype=np.int32).T

    def _sequences_at_once(self) -> Iterator[list[WatchedSequence]]:
        at_once: list[WatchedSequence] = []
        num_entries = 0
        for found in self.sequences:
            # Names take about as much as some dozens of entries.
            size = 64 + len(found.block_table)
            if at_once and num_entries + size > _MAX_TABLE_ENTRIES:
                yield at_once
                at_once, num_entries = [], 0
            at_once.append(found)
            num_entries += size
        if at_once:
            yield at_once
