"""What the compute service knows of each row, and what it still has to be told."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.request import Sequence
    from router.step import Fork, StepBatch, Work


class RowMirror:
    """Collects changes of rows until a step carries them.

    A step may not run at all (memory refused everyone), so changes are kept here and not in the step. A row that compute
    does not know is sent whole when it runs, so changes are kept only for known rows.
    """

    def __init__(self) -> None:
        self._known: dict[int, int] = {}  # row -> incarnation
        self._drops: list[int] = []
        self._appends: dict[int, list[int]] = {}
        self._remaps: dict[int, dict[int, int]] = {}
        self._copies: list[tuple[int, int]] = []  # of steps not acknowledged, oldest first
        self._new_copies: list[tuple[int, int]] = []
        self._needs_reset = True

    def reset(self) -> None:
        """Compute forgot everything: the next step sends whole rows, and again the copies that may be lost."""
        self._known.clear()
        self._drops.clear()
        self._appends.clear()
        self._remaps.clear()
        self._needs_reset = True

    def acknowledge_copies(self) -> None:
        """Every copy that was sent has been made."""
        self._copies.clear()

    def drop_new_copies(self) -> bool:
        """Copies that no step carried are not owed to anybody; whether none is owed at all now."""
        self._new_copies.clear()
        return not self._copies

    def drop(self, row: int) -> None:
        """The row's sequence gave it up."""
        self._appends.pop(row, None)
        self._remaps.pop(row, None)
        if self._known.pop(row, None) is not None:
            self._drops.append(row)

    def append(self, row: int, block_id: int) -> None:
        """The row's table grew."""
        if row in self._known:
            self._appends.setdefault(row, []).append(block_id)

    def remap(self, row: int, index: int, block_id: int) -> None:
        """An entry of the row's table changed."""
        if row in self._known:
            self._remaps.setdefault(row, {})[index] = block_id

    def copy(self, src: int, dst: int) -> None:
        """A copy was ordered."""
        self._new_copies.append((src, dst))

    def fill(self, batch: StepBatch, forks: list[Fork]) -> None:
        """Put into `batch` all that compute has to be told before it runs the work of `batch`."""
        batch.reset = self._needs_reset
        batch.copies = self._copies_to_send()
        batch.drop_rows, self._drops = self._drops, []
        batch.forks = [fork for fork in forks if self._can_fork(fork)]
        for fork in batch.forks:
            self._known[fork.child.row] = fork.child.incarnation
        batch.new_rows = [work.sequence for work in batch.work if not self._knows(work)]
        for sequence in batch.new_rows:
            self._known[sequence.row] = sequence.incarnation
        batch.appends = [(row, block) for row, found in self._appends.items() for block in found]
        batch.remaps = [
            (row, index, block)
            for row, entries in self._remaps.items()
            for index, block in entries.items()
        ]
        self._appends.clear()
        self._remaps.clear()
        self._needs_reset = False

    def _copies_to_send(self) -> list[tuple[int, int]]:
        sent = self._copies + self._new_copies if self._needs_reset else self._new_copies
        self._copies += self._new_copies
        self._new_copies = []
        return list(sent)

    def _can_fork(self, fork: Fork) -> bool:
        # Compute keeps the outputs of two steps only.
        parent = fork.parent
        return self._known.get(parent.row) == parent.incarnation and not self._needs_reset

    def _knows(self, work: Work) -> bool:
        sequence: Sequence = work.sequence
        return self._known.get(sequence.row) == sequence.incarnation
