"""What tables hold of a pool, and what of it holds tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from memory_service.integrity import check_integrity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memory_service.block_manager import BlockManager

SESSION = 1


@dataclass(frozen=True, slots=True)
class Held:
    """At one moment, between two steps."""

    num_tokens: int  # acknowledged; each slot once, however many tables hold it
    num_reserved: int  # those and the ones in flight
    num_slots: int  # of the distinct blocks that tables hold
    num_entries: int  # of all tables
    num_sequences: int


@dataclass(slots=True)
class Usage:
    """Sums over steps."""

    num_steps: int = 0
    num_tokens: int = 0
    num_reserved: int = 0
    num_slots: int = 0
    num_entries: int = 0
    num_sequences: int = 0

    def add(self, held: Held) -> None:
        """Count a step."""
        self.num_steps += 1
        self.num_tokens += held.num_tokens
        self.num_reserved += held.num_reserved
        self.num_slots += held.num_slots
        self.num_entries += held.num_entries
        self.num_sequences += held.num_sequences

    @property
    def held_share(self) -> float:
        """Of the slots in blocks that tables hold, those with acknowledged tokens."""
        return self.num_tokens / self.num_slots

    @property
    def reserved_share(self) -> float:
        """The same, tokens in flight included."""
        return self.num_reserved / self.num_slots

    def pool_share(self, num_slots: int) -> float:
        """Of a pool of `num_slots`, those with acknowledged tokens."""
        return self.num_tokens / (self.num_steps * num_slots)

    def saved(self, block_size: int) -> float:
        """Blocks that sharing saves, of those that tables would hold without it."""
        return 1 - self.num_slots / (self.num_entries * block_size)

    @property
    def sequences_at_once(self) -> float:
        """Mean over the steps."""
        return self.num_sequences / self.num_steps


def measure(manager: BlockManager, ends: dict[int, int]) -> Held:
    """What the live rows hold; raises RuntimeError where tables and reference counts disagree.

    Args:
        manager: between two steps.
        ends: by live row, the end of its tokens in flight.
    """
    table = manager.table(SESSION)
    rows = np.fromiter(ends, dtype=np.int32)
    widths = table.num_blocks[rows]
    columns = np.arange(widths.max(initial=0))
    is_entry = columns < widths[:, None]
    blocks = table.entries[rows][:, : len(columns)][is_entry]
    ref_counts = np.bincount(blocks, minlength=manager.pool.num_blocks)
    if not np.array_equal(ref_counts, manager.pool.ref_counts):
        raise RuntimeError("the tables of the live rows are not what the reference counts count")

    def filled(counts: NDArray[np.int32]) -> int:
        begins = columns * manager.block_size
        per_entry = np.clip(counts[:, None] - begins, 0, manager.block_size)[is_entry]
        per_block = np.zeros(manager.pool.num_blocks, dtype=np.int64)
        np.maximum.at(per_block, blocks, per_entry)
        return int(per_block.sum())

    return Held(
        filled(table.num_computed[rows]),
        filled(np.fromiter(ends.values(), dtype=np.int32)),
        int(np.count_nonzero(ref_counts)) * manager.block_size,
        len(blocks),
        len(rows),
    )


def check_books(manager: BlockManager) -> None:
    """Raise RuntimeError where the manager's books disagree."""
    wrong = check_integrity(manager)
    if wrong:
        raise RuntimeError(f"{len(wrong)} disagreements, the first: {wrong[0]}")
