"""What the compute service knows of each row, and what it still has to be told."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from router.step import Fork, StepBatch


class RowMirror:
    """Collects changes of rows until a step carries them.

    A step may not run at all (memory refused everyone), so changes are kept here and not in the step. A row that compute
    does not know is sent whole when it runs, so changes are kept only for known rows.
    """

    def __init__(self) -> None:
        self._known: dict[int, int] = {}  # row -> incarnation
        self._drops: dict[int, int] = {}  # the same, of rows that were given up
        self._forks: list[Fork] = []
        self._appends: dict[int, list[int]] = {}
        self._remaps: dict[int, dict[int, int]] = {}
        self._copies: list[tuple[int, tuple[int, int]]] = []  # (step, copy), not acknowledged
        self._new_copies: list[tuple[int, int]] = []
        self._needs_reset = True

    def reset(self) -> None:
        """Compute forgot everything: the next step sends whole rows, and again the copies that may be lost."""
        self._known.clear()
        self._drops.clear()
        self._forks.clear()
        self._appends.clear()
        self._remaps.clear()
        self._needs_reset = True

    def acknowledge_copies(self, step: int) -> None:
        """Every copy that was sent up to `step` has been made."""
        self._copies = [found for found in self._copies if found[0] > step]

    def drop_new_copies(self) -> bool:
        """Copies that no step carried are not owed to anybody; whether no other is owed either."""
        self._new_copies.clear()
        return not self._copies

    def drop(self, row: int) -> None:
        """The row's sequence gave it up."""
        self._appends.pop(row, None)
        self._remaps.pop(row, None)
        self._forks = [fork for fork in self._forks if fork.child.row != row]
        incarnation = self._known.pop(row, None)
        if incarnation is not None:
            self._drops[row] = incarnation

    def fork(self, fork: Fork) -> None:
        """Memory is asked to fork; so will be compute."""
        self._forks.append(fork)

    @property
    def parent_rows(self) -> set[int]:
        """Rows that compute needs until the forks it has not heard of are made."""
        return {fork.parent_row for fork in self._forks}

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

    def fill(self, batch: StepBatch) -> None:
        """Put into `batch` all that compute has to be told before it runs the work of `batch`."""
        batch.reset = self._needs_reset
        batch.copies = self._copies_to_send(batch.step)
        batch.forks = self._forks_to_send()
        for fork in batch.forks:
            self._known[fork.child.row] = fork.child.incarnation
        # Rows are dropped before others are forked from them: parents are dropped with the next step.
        parent_rows = {fork.parent_row for fork in batch.forks}
        batch.drop_rows = [row for row in self._drops if row not in parent_rows]
        self._drops = {row: self._drops[row] for row in parent_rows & self._drops.keys()}
        known, work = self._known, batch.work
        batch.new_rows = [
            sequence
            for sequence, row, incarnation in zip(
                work.sequences, work.rows, work.incarnations, strict=True
            )
            if known.get(row) != incarnation
        ]
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

    def _copies_to_send(self, step: int) -> list[tuple[int, int]]:
        again = [copy for _, copy in self._copies] if self._needs_reset else []
        new, self._new_copies = self._new_copies, []
        self._copies += [(step, copy) for copy in new]
        return again + new

    def _forks_to_send(self) -> list[Fork]:
        """Those that compute can make; other children come whole when they run: their token is known by then."""
        forks, self._forks = self._forks, []
        if self._needs_reset:
            return []
        has = self._known | self._drops
        return [fork for fork in forks if has.get(fork.parent_row) == fork.parent_incarnation]
