"""The scheduler: who runs how many tokens in the next step.

Pure calls around each message: `plan` before memory is asked, `admit` with its answer, `acknowledge` and `take_outputs`
with what compute returned. There are no prefill and decode modes: a sequence runs what is known of it and not yet
computed, clipped by the token budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from quire.errors import QuotaExceeded, StepFailed
from router.admissions import Admissions
from router.failure_isolation import FailureIsolation
from router.preemption import victims_of
from router.request import FinishReason, SequenceState
from router.requests import RequestTable
from router.running import RELEASE_REASONS, Running
from router.step import RefusalReason, ReleaseReason, StepPlan, StepWork

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from quire.errors import QuireError
    from router.request import Request, Sequence
    from router.step import (
        MemoryAnswer,
        StepBatch,
        StepFailure,
        StepResult,
    )
    from router.tally import Tally


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

    One owner calls it, from one thread: plan and then admit, and skip when that gave no batch; acknowledge and
    take_outputs, or fail, for every batch, in the order in which they were made, of which several may be in flight.
    Between a plan and its admit comes nothing but take_outputs, `add` and `abort`, which may come at any time.
    """

    def __init__(self, limits: SchedulerLimits, tally: Tally) -> None:
        self._limits = limits
        self._tally = tally
        self._steps = count(1)
        self._requests = RequestTable(limits.queue_limit)
        self._running = Running(limits.max_num_seqs, limits.block_size)
        self._admissions = Admissions(self._requests.waiting, self._running.rows)
        self._isolation = FailureIsolation()
        self._has_left = False  # somebody who ran, since the last plan
        self._last_batch = 0  # number of the last step that was made
        self._lost_up_to = 0  # the last step that was in flight when an earlier one failed
        self.num_available_blocks: int | None = None  # after memory's last answer
        self.victims: list[Sequence] = []  # preempted at the last answer

    @property
    def requests(self) -> RequestTable:
        """The live requests."""
        return self._requests

    @property
    def num_running(self) -> int:
        """Sequences that hold a row."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for admission, those included that memory is being asked about."""
        return self._admissions.num_waiting

    @property
    def num_running_requests(self) -> int:
        """Requests of which at least one sequence runs; all other live ones wait."""
        return len({id(sequence.request) for sequence in self._running})

    @property
    def owes_memory(self) -> bool:
        """Whether memory has something to hear, which may free blocks."""
        return self._running.owes_memory

    @property
    def has_work(self) -> bool:
        """Whether somebody waits or runs, or blocks are to be given back."""
        return bool(self._requests.waiting or self._running or self.owes_memory)

    @property
    def has_work_to_plan(self) -> bool:
        """Whether a step that is planned now may run anything: all that runs may be in flight to its end."""
        if self._isolation.suspects() is None and self._requests.waiting:
            return True
        return any(sequence.tokens_to_run()[1] > 0 for sequence in self._candidates())

    @property
    def may_overlap(self) -> bool:
        """Whether a step may be planned while another is in flight: not while the guilty one of a failure is sought."""
        return not self._isolation.is_active

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
                self._leave(sequence, RELEASE_REASONS[reason])
                sequence.cut_off(reason)
        self._forget_if_finished(request)

    def _end(self, request: Request, error: QuireError) -> None:
        request.fail(error)
        self.abort(request, FinishReason.ERROR)

    def _forget_if_finished(self, request: Request) -> None:
        if self._requests.forget_if_finished(request):
            self._tally.finished(request)

    def _leave(self, sequence: Sequence, reason: ReleaseReason) -> None:
        """Take a sequence out of wherever it is."""
        self._isolation.forget([sequence])
        self._admissions.remove(sequence)
        if self._running.leave(sequence, reason):
            self._has_left = True
            self._admissions.gave_blocks_up(sequence)

    # Plan

    def plan(self) -> StepPlan:
        """What the next step asks of memory. The caller must go on with `admit`."""
        plan = StepPlan(next(self._steps))
        self._has_left = False
        plan.watermark_blocks = self._limits.watermark_blocks
        self._running.plan(plan)
        budget = self._plan_extends(plan)
        if self._isolation.suspects() is None and budget > 0:
            self._admissions.plan(plan, budget)
        return plan

    def _plan_extends(self, plan: StepPlan) -> int:
        budget, extends = self._limits.max_num_batched_tokens, plan.extends
        for sequence in self._candidates():
            start, num_tokens = sequence.tokens_to_run()
            if num_tokens > budget:  # noqa: PLR1730 -- as in `tokens_to_run`
                num_tokens = budget
            if num_tokens > 0:
                extends.add(sequence, start, num_tokens)
                budget -= num_tokens
        return budget

    def _candidates(self) -> Iterator[Sequence]:
        """Who may run, most urgent first."""
        suspects = self._isolation.suspects()
        if suspects is None:
            return iter(self._running)
        return (found for found in suspects if self._running.holds(found))

    # Admit

    def admit(self, plan: StepPlan, answer: MemoryAnswer) -> StepBatch | None:
        """The batch that compute can run with what memory gave; None when nobody can run."""
        self.num_available_blocks = answer.num_available_blocks
        self.victims = []
        if answer.refusals:
            self._end_larger_than_quota(plan, answer)
        self._running.take_tables(plan, answer)
        work = plan.extends.copy()
        self._take_admissions(plan, answer, work)
        if answer.refusals:
            self._preempt_for(plan.extends, answer)
        if answer.refusals or self._has_left:
            work = self._runnable(work, answer)
        if not work:
            return None
        self._last_batch = plan.step
        return self._running.make_batch(plan, work)

    def _end_larger_than_quota(self, plan: StepPlan, answer: MemoryAnswer) -> None:
        """Waiting is of no use to them, and they would keep their tenant's blocks."""
        for sequence in [*plan.extends.sequences, *plan.admits]:
            is_larger = answer.refusals.get(sequence.row) is RefusalReason.LARGER_THAN_QUOTA
            if is_larger and self._requests.is_live(sequence.request):
                self._end(sequence.request, _larger_than_quota(sequence.request))

    def _take_admissions(self, plan: StepPlan, answer: MemoryAnswer, work: StepWork) -> None:
        for sequence, admission in self._admissions.take(plan, answer):
            request, num_cached = sequence.request, admission.num_cached_tokens
            if sequence.state is SequenceState.FINISHED:  # aborted since the plan
                assert request.finish_reason is not None
                self._running.give_back(sequence.row, RELEASE_REASONS[request.finish_reason])
                continue
            self._running.start(sequence)
            if sequence.begin(admission.block_table, num_cached):
                self._tally.admitted(request)
            work.add(sequence, num_cached, admission.num_scheduled_tokens)

    def _runnable(self, work: StepWork, answer: MemoryAnswer) -> StepWork:
        found = StepWork()
        for sequence, _, row, start, num_tokens in work:
            if self._running.holds(sequence) and row not in answer.refusals:
                found.add(sequence, start, num_tokens)
        return found

    def _preempt_for(self, planned: StepWork, answer: MemoryAnswer) -> None:
        """Make room for the running sequences that memory refused: the next step finds it."""
        refused = (
            work
            for work in planned
            if self._running.holds(work.sequence) and work.row in answer.refusals
        )
        self.victims = victims_of(refused, self._running, answer, self._limits.block_size)
        for victim in self.victims:
            self._tally.preempted()
            self._leave(victim, ReleaseReason.PREEMPTED)
            self._admissions.wait_again(victim)

    # Apply

    def skip(self, plan: StepPlan) -> None:
        """The step ran nothing."""
        self._running.skipped(plan)

    def acknowledge(self, batch: StepBatch) -> None:
        """The step ran: its tokens are computed. What it sampled stays pending, and needs not be known to plan on."""
        self._isolation.step_succeeded(batch.work.sequences)
        self._running.acknowledge(batch)

    def take_outputs(self, batch: StepBatch, result: StepResult) -> None:
        """Take in the tokens that an acknowledged step sampled, and the ends that they bring."""
        outputs, logprobs, arrived_at = batch.outputs, result.logprobs, self._tally.now()
        took: list[Sequence] = []
        columns = (
            range(len(outputs)),
            outputs.sequences,
            outputs.incarnations,
            outputs.positions,
            result.token_ids,
        )
        for index, sequence, incarnation, position, token_id in zip(*columns, strict=True):
            if not sequence.goes_on_at(position, incarnation):
                continue
            took.append(sequence)
            sequence.append(token_id, logprobs.get(index) if logprobs else None)
            if sequence.state is SequenceState.FINISHED:
                self._leave(sequence, ReleaseReason.FINISHED)
                self._forget_if_finished(sequence.request)
        self._tally.tokens(took, arrived_at)

    def fail(self, batch: StepBatch, failure: StepFailure) -> Sequence | None:
        """Roll back to what was acknowledged; the sequence that makes steps fail once it is found: its request ends.

        Steps behind a failed one are discarded by compute, which tells of each: they were rolled back with it.
        """
        if batch.step <= self._lost_up_to:
            return None
        self.compute_lost()
        guilty = self._isolation.step_failed(
            [found for found in batch.work.sequences if self._running.holds(found)],
            len(batch.work),
        )
        if guilty is not None:
            self._end(guilty.request, _step_failed(guilty.request, failure))
        return guilty

    def compute_lost(self) -> None:
        """Compute forgot its rows and did not acknowledge what is in flight: the next step is a reset."""
        self._lost_up_to = self._last_batch
        self._running.compute_lost()

    def session_resumed(self, held_rows: Iterable[int]) -> None:
        """Memory answers on a new stream: give back every row it still holds, recompute from prefix hits."""
        self._isolation = FailureIsolation()
        orphans = self._running.session_resumed(held_rows)
        for sequence in [*orphans, *self._admissions.session_resumed()]:
            self._admissions.wait_again(sequence)


def _step_failed(request: Request, failure: StepFailure) -> StepFailed:
    message = f"the model could not run this request: {failure.message}"
    return StepFailed(message, metadata={"request_id": request.request_id})


def _larger_than_quota(request: Request) -> QuotaExceeded:
    owner = f"of tenant {request.tenant!r}" if request.tenant else "of callers without a tenant"
    message = (
        f"the request needs more blocks than the hard quota {owner} allows; ask for a shorter prompt, fewer tokens or "
        "fewer samples, or let the operator raise the quota"
    )
    return QuotaExceeded(message, metadata={"tenant": request.tenant})
