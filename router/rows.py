"""Rows: the small numbers by which memory and compute know running sequences."""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING

from router.request import SequenceState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from router.request import Sequence


class RowTable:
    """Who holds which row of `[0, num_rows)`.

    A row is free, given to a sequence that memory has not admitted yet, held by a running sequence, or released but not
    yet told to memory. Rows of siblings that are not forked yet are counted, not numbered.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._free = list(range(num_rows - 1, -1, -1))
        self.holders: dict[int, Sequence] = {}  # by row, for others to read
        self._by_urgency: list[Sequence] = []  # they, in the order that every step plans them in

    def __len__(self) -> int:
        """Running sequences."""
        return len(self.holders)

    def get(self, row: int) -> Sequence | None:
        """The running sequence that holds `row`."""
        return self.holders.get(row)

    def __iter__(self) -> Iterator[Sequence]:
        """The running sequences, most urgent first."""
        return iter(self._by_urgency.copy())

    def holds(self, sequence: Sequence) -> bool:
        """Whether `sequence` runs."""
        return self.holders.get(sequence.row) is sequence

    @property
    def num_unclaimed(self) -> int:
        """Free rows that no sibling will need."""
        return len(self._free) - sum(found.num_sequences - 1 for found in self.holders.values())

    def give(self, sequence: Sequence) -> None:
        """Give a free row to `sequence`, with a new incarnation."""
        sequence.row = self._free.pop()
        sequence.incarnation += 1

    def start(self, sequence: Sequence) -> None:
        """Let `sequence` run in the row it was given."""
        sequence.state = SequenceState.RUNNING
        self.holders[sequence.row] = sequence
        insort(self._by_urgency, sequence, key=lambda found: found.urgency)

    def release(self, sequence: Sequence) -> int:
        """Stop `sequence`; its row is not free before `free` says that memory knows."""
        del self.holders[sequence.row]
        self._by_urgency.remove(sequence)
        return sequence.row

    def free(self, rows: Iterable[int]) -> None:
        """`rows` mean nothing to memory: it was told that they were released, or did not admit them."""
        self._free += rows

    def clear(self, held_rows: Iterable[int]) -> None:
        """Nobody runs; `held_rows` are still to be released, all others are free."""
        self.holders.clear()
        self._by_urgency.clear()
        held = set(held_rows)
        self._free = [row for row in range(self._num_rows - 1, -1, -1) if row not in held]
