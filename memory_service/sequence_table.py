"""The sequences of one session: a row each, in arrays, so that a step of hundreds of rows needs no loop over them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from memory_service.block_hash import BlockHash
    from memory_service.demand import IntArray
    from memory_service.tenants import Home, Tenant

_FIRST_WIDTH = 16
_ROWS_OF_A_PART = 64


@dataclass(slots=True)
class Sequence:
    """What is known of a sequence beside its table."""

    sequence_id: str
    request_id: str
    tenant: Tenant
    incarnation: int
    num_cached_tokens: int
    admitted_at: float  # seconds since the epoch
    expected_keys: list[BlockHash] = field(default_factory=list)  # it will fill these next
    retention: Home | None = None  # where the blocks that it seals count


class SequenceTable:
    """Block tables, their lengths and the acknowledged tokens, by row.

    Table entry i of a row covers tokens `[i * block_size, (i + 1) * block_size)`; entries from `num_blocks[row]` on mean
    nothing.
    """

    def __init__(self, max_num_rows: int) -> None:
        self.max_num_rows = max_num_rows
        self.num_blocks = np.zeros(max_num_rows, dtype=np.int32)
        self.num_computed = np.zeros(max_num_rows, dtype=np.int32)
        self.num_reserved = np.zeros(max_num_rows, dtype=np.int32)  # end of what steps may write
        self.is_live = np.zeros(max_num_rows, dtype=np.bool_)
        self.entries = np.zeros((max_num_rows, _FIRST_WIDTH), dtype=np.int32)
        self._sequences: dict[int, Sequence] = {}

    def __len__(self) -> int:
        """Live sequences."""
        return len(self._sequences)

    def __contains__(self, row: int) -> bool:
        """Whether a sequence lives in `row`."""
        return row in self._sequences

    def __getitem__(self, row: int) -> Sequence:
        """The sequence in `row`."""
        return self._sequences[row]

    def items(self) -> Iterator[tuple[int, Sequence]]:
        """Rows with their sequences, by row."""
        return iter(sorted(self._sequences.items()))

    def add(self, row: int, sequence: Sequence, block_table: IntArray, num_computed: int) -> None:
        """Let `sequence` live in the unused `row`."""
        self._sequences[row] = sequence
        self.is_live[row] = True
        self.num_computed[row] = self.num_reserved[row] = num_computed
        self.num_blocks[row] = 0
        self.append(row, block_table)

    def remove(self, row: int) -> Sequence:
        """End the sequence in `row`."""
        self.num_blocks[row] = 0
        self.is_live[row] = False
        return self._sequences.pop(row)

    def append(self, row: int, block_ids: IntArray | list[int]) -> None:
        """Let the row's table grow."""
        begin = int(self.num_blocks[row])
        end = begin + len(block_ids)
        if end > self.entries.shape[1]:
            self._widen(end)
        self.entries[row, begin:end] = block_ids
        self.num_blocks[row] = end

    def append_each(self, rows: list[int], block_ids: list[int]) -> None:
        """Let the table of each of these rows, none of them twice, grow by one block."""
        ends = self.num_blocks[rows]
        if ends.max(initial=0) >= self.entries.shape[1]:
            self._widen(int(ends.max()) + 1)
        self.entries[rows, ends] = block_ids
        self.num_blocks[rows] = ends + 1

    def _widen(self, width: int) -> None:
        wider = np.zeros((self.max_num_rows, max(width, 2 * self.entries.shape[1])), np.int32)
        wider[:, : self.entries.shape[1]] = self.entries
        self.entries = wider

    def live_parts(self) -> Iterator[tuple[IntArray, IntArray, NDArray[np.bool_]]]:
        """The live rows, some at a time: the rows, their entries side by side, and which of these mean anything.

        Short tables come first, so that rows of one part are about as long as each other.
        """
        rows = np.flatnonzero(self.is_live).astype(np.int32)
        rows = rows[np.argsort(self.num_blocks[rows], kind="stable")]
        for begin in range(0, len(rows), _ROWS_OF_A_PART):
            some = rows[begin : begin + _ROWS_OF_A_PART]
            lengths = self.num_blocks[some]
            width = int(lengths[-1])
            yield some, self.entries[some, :width], np.arange(width) < lengths[:, None]

    def block_table(self, row: int) -> IntArray:
        """The row's table, as a copy."""
        return self.entries[row, : self.num_blocks[row]].copy()
