"""The sequences that hold a row, and what memory and compute still have to be told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.request import FinishReason
from router.row_mirror import RowMirror
from router.rows import RowTable
from router.step import Commits, Fork, Release, ReleaseReason, StepBatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from router.request import Sequence
    from router.step import MemoryAnswer, StepPlan, StepWork

RELEASE_REASONS = {
    FinishReason.STOP: ReleaseReason.FINISHED,
    FinishReason.LENGTH: ReleaseReason.FINISHED,
    FinishReason.CANCELLED: ReleaseReason.CANCELLED,
    FinishReason.ERROR: ReleaseReason.FAILED,
}


class Running:
    """Rows, and the changes of them that the next messages carry.

    Memory hears of progress, ends and forks with the next plan; compute of tables and copies with the next step that
    runs.
    """

    def __init__(self, num_rows: int, block_size: int) -> None:
        self.rows = RowTable(num_rows)
        self._block_size = block_size
        self._mirror = RowMirror()
        self._progressed: dict[int, Sequence] = {}  # by row: memory has not heard how far
        self._commits = Commits()  # of those among them that have left
        self._releases: dict[int, ReleaseReason] = {}
        self._forks: list[Fork] = []  # of which memory is to hear
        self._unborn: list[Fork] = []  # whose source step is in flight
        self._unused_rows: set[int] = set()  # released, and not free yet
        self._acknowledged_step = 0

    def __len__(self) -> int:
        """Sequences that hold a row."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Sequence]:
        """They, most urgent first."""
        return iter(self.rows)

    def holds(self, sequence: Sequence) -> bool:
        """Whether `sequence` holds its row."""
        return self.rows.holds(sequence)

    @property
    def owes_memory(self) -> bool:
        """Whether memory has something to hear, which may free blocks."""
        return bool(self._progressed or self._commits or self._releases or self._forks)

    # Begin and end

    def start(self, sequence: Sequence) -> None:
        """Memory admitted `sequence` in the row it was given."""
        self.rows.start(sequence)

    def leave(self, sequence: Sequence, reason: ReleaseReason) -> bool:
        """Take `sequence` out, fork or row; whether it held a row. Its blocks return with the next plan."""
        if self._forks or self._unborn:
            self._forks = [fork for fork in self._forks if fork.child is not sequence]
            self._unborn = [fork for fork in self._unborn if fork.child is not sequence]
        if not self.rows.holds(sequence):
            return False
        row = self.rows.release(sequence)
        if self._progressed.pop(row, None):
            self._commit(sequence)
        self._mirror.drop(row)
        self.give_back(row, reason)
        return True

    def give_back(self, row: int, reason: ReleaseReason) -> None:
        """Release a row that memory knows and nobody holds."""
        self._releases[row] = reason

    # Plan

    def plan(self, plan: StepPlan) -> None:
        """Put into `plan` all that memory has to hear."""
        for sequence in self._progressed.values():
            self._commit(sequence)
        self._progressed = {}
        plan.commits, self._commits = self._commits, Commits()
        plan.forks, self._forks = self._forks, []
        self._plan_releases(plan)
        if not self.rows:
            # Copies that a lost step may not have made are owed to nobody: their sources need no pins any more.
            self._acknowledge_step(plan.step - 1)
        plan.acknowledged_step = self._acknowledged_step
        for fork in plan.forks:
            self.rows.give(fork.child)
            self.rows.start(fork.child)
            # Memory takes the commits of a plan in before its forks: it knows as much of the child as of the parent.
            fork.child.num_committed_tokens = min(fork.parent.num_committed_tokens, fork.num_tokens)
            self._mirror.fork(fork)

    def _commit(self, sequence: Sequence) -> None:
        """Tell memory how far a sequence is that holds its row."""
        size, num_computed = self._block_size, sequence.num_computed_tokens
        first, end = sequence.num_committed_tokens // size, num_computed // size
        sequence.num_committed_tokens = num_computed
        token_ids = sequence.token_ids[first * size : end * size].tobytes() if end > first else b""
        self._commits.add(sequence.row, num_computed, token_ids)

    def _plan_releases(self, plan: StepPlan) -> None:
        """Release all rows but those of parents whose children memory makes in this very step."""
        parents = {fork.parent_row for fork in plan.forks}
        kept = {row: reason for row, reason in self._releases.items() if row in parents}
        plan.releases = [
            Release(row, reason) for row, reason in self._releases.items() if row not in parents
        ]
        self._releases = kept
        # Nobody gets a row of which compute has yet to make a child.
        released = self._unused_rows | {release.row for release in plan.releases}
        self._unused_rows = released & self._mirror.parent_rows
        self.rows.free(released - self._unused_rows)

    # Admit

    def take_tables(self, plan: StepPlan, answer: MemoryAnswer) -> None:
        """Bring the block tables up to memory's answer."""
        for fork in plan.forks:
            fork.child.block_table = answer.forked_tables[fork.child.row]
        # A sequence may have been aborted since the plan: its row is empty until the next one.
        for row, block_id in answer.new_blocks:
            if (sequence := self.rows.get(row)) is not None:
                sequence.block_table.append(block_id)
                self._mirror.append(row, block_id)
        for row, index, block_id in answer.remaps:
            if (sequence := self.rows.get(row)) is not None:
                sequence.block_table[index] = block_id
                self._mirror.remap(row, index, block_id)
        for src, dst in answer.copies:
            self._mirror.copy(src, dst)

    def make_batch(self, plan: StepPlan, work: StepWork) -> StepBatch:
        """The step that runs `work`, with all that compute has to be told before."""
        batch = StepBatch(step=plan.step, work=work)
        self._mirror.fill(batch)
        forked = {fork.child.row for fork in batch.forks}
        step, pending, outputs = batch.step, batch.pending, batch.outputs
        columns = (work.sequences, work.rows, work.starts, work.num_tokens)
        for sequence, row, start, num_tokens in zip(*columns, strict=True):
            end, num_known = start + num_tokens, len(sequence.token_ids)
            if end > num_known and row not in forked:
                pending.add(row, sequence.pending_step, sequence.pending_output)
            sequence.num_in_flight_tokens += num_tokens
            if end >= num_known and end >= sequence.pending_end:
                sequence.pending_end, sequence.pending_step = end + 1, step
                sequence.pending_output = outputs.add(row, sequence, sequence.incarnation, end)
                if not sequence.has_forked:
                    self._fork_siblings(sequence, batch)
        return batch

    def _fork_siblings(self, sequence: Sequence, batch: StepBatch) -> None:
        """Where the prompt ends it is sampled for the siblings too, which begin so."""
        for sample_index in sequence.missing_samples:
            child, end = sequence.fork(sample_index), sequence.num_prompt_tokens
            index = batch.outputs.add(sequence.row, child, child.incarnation + 1, end)
            child.pending_end, child.pending_step, child.pending_output = end + 1, batch.step, index
            fork = Fork(sequence, sequence.row, sequence.incarnation, child, end, batch.step, index)
            self._forks.append(fork)
            self._unborn.append(fork)
        sequence.has_forked = True

    def skipped(self, plan: StepPlan) -> None:
        """The step ran nothing: whoever needed a copy of its answer was refused or preempted."""
        if self._mirror.drop_new_copies():
            self._acknowledge_step(plan.step)

    # Apply

    def acknowledge(self, batch: StepBatch) -> None:
        """The step was run: its copies were made, and its tokens are computed."""
        self._acknowledge_step(batch.step)
        self._unborn = [fork for fork in self._unborn if fork.source_step != batch.step]
        work, holders = batch.work, self.rows.holders
        columns = (work.sequences, work.incarnations, work.rows, work.num_tokens)
        for sequence, incarnation, row, num_tokens in zip(*columns, strict=True):
            if sequence.incarnation == incarnation and holders.get(row) is sequence:
                sequence.num_in_flight_tokens -= num_tokens
                sequence.num_computed_tokens += num_tokens
                self._progressed[row] = sequence

    def _acknowledge_step(self, step: int) -> None:
        self._acknowledged_step = max(step, self._acknowledged_step)
        self._mirror.acknowledge_copies(step)

    # Losses

    def compute_lost(self) -> None:
        """Compute forgot its rows and did not acknowledge what is in flight: the next step is a reset."""
        self._mirror.reset()
        for fork in list(self._unborn):
            self._undo(fork)
        for sequence in self.rows:
            sequence.roll_back()

    def _undo(self, fork: Fork) -> None:
        """The prompt was not computed to its end: the child is forked again when it is."""
        self.leave(fork.child, ReleaseReason.FAILED)
        del fork.child.request.sequences[fork.child.sample_index]
        fork.parent.has_forked = False

    def session_resumed(self, held_rows: Iterable[int]) -> list[Sequence]:
        """Give back every row that memory still holds; the sequences that have none any more."""
        orphans = [*self.rows, *(fork.child for fork in self._forks)]
        # A row that was given up and not told of still belongs to whoever gave it up.
        self._releases = {row: self._releases.get(row, ReleaseReason.RESUMED) for row in held_rows}
        self._progressed, self._commits = {}, Commits()
        self._forks, self._unborn = [], []
        self._unused_rows.clear()
        self.rows.clear(self._releases)
        self._mirror = RowMirror()
        return orphans
