"""The scheduler: who runs how many tokens in the next step.

A pure pair around each message: `plan` before memory is asked, `admit` with its answer, `apply` with what compute
returned. There are no prefill and decode modes: a sequence runs what is known of it and not yet computed, clipped by the
token budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from quire.errors import StepFailed
from router.failure_isolation import FailureIsolation
from router.preemption import choose_victims
from router.request import FinishReason, SequenceState
from router.requests import RequestTable
from router.row_mirror import RowMirror
from router.rows import RowTable
from router.step import Commit, Fork, Output, RefusalReason, StepBatch, StepPlan, Work

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from router.request import Request, Sequence
    from router.step import MemoryAnswer, StepFailure, StepResult, TokenLogprobs
    from router.tally import Tally

# Admissions asked for in one step: each costs its whole prompt on the wire.
MAX_ADMITS_PER_STEP = 16


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What bounds a step."""

    block_size: int
    max_num_seqs: int  # rows
    max_num_batched_tokens: int  # token budget of a step
    watermark_blocks: int  # blocks that admissions leave over
    queue_limit: int  # sequences that may wait


class Scheduler:
    """Sequences, the rows they hold, and the steps that run them.

    One owner calls it, from one thread, in the order plan, admit, then apply, fail or skip; `add` and `abort` may come
    between any two of them.
    """

    def __init__(self, limits: SchedulerLimits, tally: Tally) -> None:
        self._limits = limits
        self._tally = tally
        self._steps = count(1)
        self._requests = RequestTable(limits.queue_limit)
        self._rows = RowTable(limits.max_num_seqs)
        self._mirror = RowMirror()
        self._isolation = FailureIsolation()
        self._commits: list[Commit] = []
        self._releases: list[int] = []
        self._forks: list[Fork] = []
        self._asked: list[Sequence] = []  # admissions that memory has not answered
        self._acknowledged_step = 0
        self.num_available_blocks: int | None = None  # after memory's last answer
        self.victims: list[Sequence] = []  # preempted at the last answer

    @property
    def requests(self) -> RequestTable:
        """The live requests."""
        return self._requests

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for admission, those included that memory is being asked about."""
        asked = [found for found in self._asked if found.state is not SequenceState.FINISHED]
        return len(self._requests.waiting) + len(asked)

    @property
    def num_running_requests(self) -> int:
        """Requests of which at least one sequence runs; all other live ones wait."""
        return len({id(sequence.request) for sequence in self._rows})

    @property
    def owes_memory(self) -> bool:
        """Whether memory has something to hear, which may free blocks."""
        return bool(self._commits or self._releases or self._forks)

    @property
    def has_work(self) -> bool:
        """Whether a step has anything to do, be it only giving blocks back."""
        return bool(self._requests.waiting or self._rows or self.owes_memory)

    def add(self, request: Request) -> None:
        """Let `request` wait for admission; raises RequestIdInUse or QueueFull."""
        self._requests.add(request)

    def abort(self, request: Request, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End every sample of `request` that still runs; its blocks return with the next step."""
        if not self._requests.is_live(request):
            return
        for sample_index in range(request.num_samples):
            sequence = request.sequences.get(sample_index)
            if sequence is None:
                request.finish_sample(sample_index, reason)
            elif sequence.state is not SequenceState.FINISHED:
                self._leave(sequence)
                sequence.cut_off(reason)
        self._forget_if_finished(request)

    def _forget_if_finished(self, request: Request) -> None:
        if self._requests.forget_if_finished(request):
            self._tally.finished(request)

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of wherever it is."""
        self._isolation.forget([sequence])
        if sequence in self._requests.waiting:
            self._requests.waiting.remove(sequence)
        self._forks = [fork for fork in self._forks if fork.child is not sequence]
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        if self._rows.holds(sequence):
            row = self._rows.release(sequence)
            self._mirror.drop(row)
            self._releases.append(row)

    # Plan

    def plan(self) -> StepPlan:
        """What the next step asks of memory. The caller must go on with `admit`."""
        plan = StepPlan(next(self._steps))
        plan.watermark_blocks = self._limits.watermark_blocks
        plan.commits, self._commits = self._commits, []
        plan.forks, self._forks = self._forks, []
        self._plan_releases(plan)
        if not self._rows:
            # Copies that a lost step may not have made are owed to nobody: their sources need no pins any more.
            self._mirror.acknowledge_copies()
            self._acknowledged_step = plan.step - 1
        plan.acknowledged_step = self._acknowledged_step
        for fork in plan.forks:
            self._rows.give(fork.child)
            self._rows.start(fork.child)
        budget = self._plan_extends(plan)
        if self._isolation.suspects() is None and budget > 0:
            self._plan_admits(plan, budget)
        return plan

    def _plan_releases(self, plan: StepPlan) -> None:
        """Release all rows but those of parents whose children are forked in this very step."""
        parents = {fork.parent.row for fork in plan.forks}
        plan.releases = [row for row in self._releases if row not in parents]
        self._releases = [row for row in self._releases if row in parents]
        self._rows.free(plan.releases)

    def _plan_extends(self, plan: StepPlan) -> int:
        budget = self._limits.max_num_batched_tokens
        for sequence in self._runnable():
            num_tokens = min(sequence.num_tokens_to_run, budget)
            if num_tokens > 0:
                start = sequence.next_position
                plan.extends.append(Work(sequence, sequence.incarnation, start, num_tokens))
                budget -= num_tokens
        return budget

    def _runnable(self) -> list[Sequence]:
        suspects = self._isolation.suspects()
        candidates: Iterable[Sequence] = self._rows if suspects is None else suspects
        return sorted(
            (found for found in candidates if self._rows.holds(found)),
            key=lambda found: found.urgency,
        )

    def _plan_admits(self, plan: StepPlan, budget: int) -> None:
        plan.admit_token_budget = budget
        num_rows = self._rows.num_unclaimed
        for sequence in self._requests.waiting.first(MAX_ADMITS_PER_STEP):
            num_rows -= sequence.num_sequences
            if num_rows < 0:
                break
            self._rows.give(sequence)
            self._requests.waiting.remove(sequence)
            plan.admits.append(sequence)
        self._asked = plan.admits

    # Admit

    def admit(self, plan: StepPlan, answer: MemoryAnswer) -> StepBatch | None:
        """The batch that compute can run with what memory gave; None when nobody can run."""
        self.num_available_blocks = answer.num_available_blocks
        self._take_tables(plan, answer)
        work = plan.extends + list(self._take_admissions(plan, answer))
        self._preempt_for(plan, answer)
        work = [found for found in work if self._may_run(found, answer)]
        return self._make_batch(plan, work) if work else None

    def _take_tables(self, plan: StepPlan, answer: MemoryAnswer) -> None:
        for fork in plan.forks:
            fork.child.block_table = answer.forked_tables[fork.child.row]
        # A sequence may have been aborted since the plan: its row is empty until the next one.
        for row, block_id in answer.new_blocks:
            if (sequence := self._rows.get(row)) is not None:
                sequence.block_table.append(block_id)
                self._mirror.append(row, block_id)
        for row, index, block_id in answer.remaps:
            if (sequence := self._rows.get(row)) is not None:
                sequence.block_table[index] = block_id
                self._mirror.remap(row, index, block_id)
        for src, dst in answer.copies:
            self._mirror.copy(src, dst)

    def _take_admissions(self, plan: StepPlan, answer: MemoryAnswer) -> Iterator[Work]:
        self._asked = []
        for sequence in plan.admits:
            admission = answer.admissions.get(sequence.row)
            was_aborted = sequence.state is SequenceState.FINISHED
            if admission is None:
                self._rows.free([sequence.row])
                if not was_aborted:
                    self._wait_again(sequence)
            elif was_aborted:
                self._releases.append(sequence.row)
            else:
                self._rows.start(sequence)
                cached = admission.num_cached_tokens
                if sequence.begin(admission.block_table, cached):
                    self._tally.admitted(sequence.request)
                yield Work(sequence, sequence.incarnation, cached, admission.num_scheduled_tokens)

    def _wait_again(self, sequence: Sequence) -> None:
        sequence.lose_row()
        self._requests.waiting.add(sequence)

    def _may_run(self, work: Work, answer: MemoryAnswer) -> bool:
        return self._rows.holds(work.sequence) and work.sequence.row not in answer.refusals

    def _preempt_for(self, plan: StepPlan, answer: MemoryAnswer) -> None:
        """Make room for the running sequences that memory refused: the next step finds it."""
        missing = {
            work.sequence.row: self._num_missing_blocks(work)
            for work in plan.extends
            if answer.refusals.get(work.sequence.row) is RefusalReason.NO_BLOCKS
        }
        self.victims = choose_victims(self._rows, missing)
        for victim in self.victims:
            self._tally.preempted()
            self._isolation.forget([victim])
            self._release(victim)
            self._wait_again(victim)

    def _num_missing_blocks(self, work: Work) -> int:
        num_blocks = -(-(work.start + work.num_tokens) // self._limits.block_size)
        # At least one: a shared last block needs a copy even when the table is long enough.
        return max(1, num_blocks - len(work.sequence.block_table))

    def _make_batch(self, plan: StepPlan, work: list[Work]) -> StepBatch:
        batch = StepBatch(step=plan.step, work=work)
        self._mirror.fill(batch, [fork for fork in plan.forks if self._rows.holds(fork.child)])
        for found in work:
            sequence = found.sequence
            sequence.num_in_flight_tokens += found.num_tokens
            if sequence.num_tokens_to_run == 0:
                batch.outputs += [
                    Output(sequence, sequence.incarnation, sample_index)
                    for sample_index in sequence.samples_to_draw
                ]
        return batch

    # Apply

    def skip(self, plan: StepPlan) -> None:
        """The step ran nothing: whoever needed a copy of its answer was refused or preempted."""
        if self._mirror.drop_new_copies():
            self._acknowledged_step = plan.step

    def apply(self, batch: StepBatch, result: StepResult) -> None:
        """Take in what compute returned: progress, tokens, ends."""
        self._acknowledged_step = batch.step
        self._mirror.acknowledge_copies()
        self._isolation.step_succeeded(work.sequence for work in batch.work)
        for work in batch.work:
            self._advance(work)
        self._tally.outputs_arrived()
        for index, output in enumerate(batch.outputs):
            if self._requests.is_live(output.sequence.request):
                logprobs = result.logprobs.get(index)
                self._take_output(output, batch.step, index, result.token_ids[index], logprobs)

    def _advance(self, work: Work) -> None:
        sequence = work.sequence
        if sequence.incarnation != work.incarnation or not self._rows.holds(sequence):
            return
        sequence.num_in_flight_tokens -= work.num_tokens
        sequence.num_computed_tokens += work.num_tokens
        self._commits.append(self._commit(sequence))

    def _commit(self, sequence: Sequence) -> Commit:
        size = self._limits.block_size
        begin = sequence.num_committed_tokens // size * size
        end = sequence.num_computed_tokens // size * size
        sequence.num_committed_tokens = sequence.num_computed_tokens
        return Commit(
            sequence.row, sequence.num_computed_tokens, sequence.token_ids[begin:end].tobytes()
        )

    def _take_output(
        self, output: Output, step: int, index: int, token_id: int, logprobs: TokenLogprobs | None
    ) -> None:
        sequence = output.sequence
        if output.sample_index != sequence.sample_index:
            parent, sequence = sequence, sequence.fork(output.sample_index)
            num_tokens = parent.num_prompt_tokens
            self._forks.append(Fork(parent, sequence, num_tokens, step, index))
        elif output.incarnation != sequence.incarnation:
            return
        sequence.has_forked = True
        self._tally.token(sequence)
        sequence.append(token_id, logprobs)
        if sequence.state is SequenceState.FINISHED:
            self._leave(sequence)
            self._forget_if_finished(sequence.request)

    def fail(self, batch: StepBatch, failure: StepFailure) -> Sequence | None:
        """Roll back to what was acknowledged; the sequence that makes steps fail once it is found: its request ends."""
        self.compute_lost()
        guilty = self._isolation.step_failed(
            [work.sequence for work in batch.work if self._rows.holds(work.sequence)]
        )
        if guilty is not None:
            request = guilty.request
            request.sink.failed(
                StepFailed(
                    f"the model could not run this request: {failure.message}",
                    metadata={"request_id": request.request_id},
                )
            )
            self.abort(request, FinishReason.ERROR)
        return guilty

    def compute_lost(self) -> None:
        """Compute forgot its rows and did not acknowledge what is in flight: the next step is a reset."""
        self._mirror.reset()
        for sequence in self._rows:
            sequence.roll_back()

    def session_resumed(self, held_rows: Iterable[int]) -> None:
        """Memory answers on a new stream: give back every row it still holds, recompute from prefix hits."""
        asked = [found for found in self._asked if found.state is not SequenceState.FINISHED]
        orphans = [*self._rows, *asked, *(fork.child for fork in self._forks)]
        self._asked, self._commits, self._forks, self._releases = [], [], [], list(held_rows)
        self._rows.clear(self._releases)
        self._mirror = RowMirror()
        self._isolation = FailureIsolation()
        for sequence in orphans:
            self._wait_again(sequence)
