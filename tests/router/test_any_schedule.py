"""The scheduler over the real block manager, with aborts, quotas, failing steps and lost replies at any point.

One or two steps are in flight, as the machine draws it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from simulated_node import POISON, SimulatedMemory, SimulatedNode
from simulated_requests import expected_tokens, make_request, sink_of

from memory_service.integrity import check_integrity
from quire.errors import QuotaExceeded, StepFailed
from router.request import FinishReason, Request
from router.scheduler import Scheduler, SchedulerLimits
from router.step import MemoryAnswer, Release, ReleaseReason, StepFailure, StepPlan
from router.tally import Tally

if TYPE_CHECKING:
    from router.step import StepBatch

SIZE = 4
NUM_BLOCKS = 15
NUM_ROWS = 6
BUDGET = 7  # tokens of a step
MAX_STEPS = 1500
TENANTS = ("", "a", "b")
FINISHES = {
    ReleaseReason.FINISHED: (FinishReason.LENGTH,),
    ReleaseReason.CANCELLED: (FinishReason.CANCELLED,),
    ReleaseReason.FAILED: (FinishReason.ERROR,),
}


class SchedulerMachine(RuleBasedStateMachine):
    """Whatever happens between steps, every request ends once, with the tokens that it would have had alone."""

    def __init__(self) -> None:
        super().__init__()
        limits = SchedulerLimits(SIZE, NUM_ROWS, BUDGET, watermark_blocks=1, queue_limit=100)
        self.tally = Tally()
        self.scheduler = Scheduler(limits, self.tally)
        self.memory = SimulatedMemory(NUM_BLOCKS, SIZE, NUM_ROWS, min_partial_tokens=1)
        self.node = CheckedNode(self.scheduler, self.memory, self)
        self.steps_in_flight = 1
        self.num_lost = 0  # steps that failed or went unheard
        self.requests: list[Request] = []
        self.aborted: set[Request] = set()
        self.least_quota: dict[str, int] = {}  # of each tenant, ever
        self.preempted: set[str] = set()  # sequences, ever
        self.was_resumed = False

    @initialize(steps_in_flight=st.integers(1, 2))
    def begin(self, steps_in_flight: int) -> None:
        self.steps_in_flight = steps_in_flight

    # What clients and operators do

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=22),
        max_tokens=st.integers(1, 12),
        num_samples=st.integers(1, 4),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from(TENANTS),
    )
    def add(
        self, prompt: list[int], max_tokens: int, num_samples: int, priority: int, tenant: str
    ) -> None:
        name = f"r{len(self.requests)}"
        self._add(make_request(name, prompt, max_tokens, num_samples, priority, tenant))

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9), at=st.integers(0, 8))
    def add_poisoned(self, prompt: list[int], at: int) -> None:
        prompt.insert(min(at, len(prompt)), POISON)
        self._add(make_request(f"r{len(self.requests)}", prompt))

    def _add(self, request: Request) -> None:
        self.requests.append(request)
        self.scheduler.add(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        if not request.is_finished:
            self.aborted.add(request)
            self.scheduler.abort(request)
            assert request.is_finished

    @rule(tenant=st.sampled_from(TENANTS), quota=st.none() | st.integers(1, NUM_BLOCKS))
    def set_quota(self, tenant: str, quota: int | None) -> None:
        self.memory.set_hard_quota(tenant, quota)
        if quota is not None:
            self.least_quota[tenant] = min(quota, self.least_quota.get(tenant, quota))

    # Steps

    @rule(count=st.integers(1, 12))
    def run_steps(self, count: int) -> None:
        for _ in range(count):
            self.node.turn(self.steps_in_flight)

    @precondition(lambda self: self.scheduler.has_work)
    @rule(fault=st.sampled_from(["before", "after", "answer", "abort"]), data=st.data())
    def run_faulty_step(self, fault: str, data: st.DataObject) -> None:
        """A step that fails on the device, ends unheard, whose answer is lost, or beside which somebody gives up."""
        if not self.node.may_begin(self.steps_in_flight):
            self.node.turn(self.steps_in_flight)
            return
        plan = self.scheduler.plan()
        answer = self.node.ask(plan)
        self.node.publish()
        if fault == "answer":
            self._lose_steps()
            self.scheduler.session_resumed(self.memory.held_rows())
            self.was_resumed = True
            return
        if fault == "abort":
            self.abort(data)
        batch = self.node.admit(plan, answer)
        if batch is None:
            self.scheduler.skip(plan)
        elif fault == "abort":
            self.node.execute(batch)
        else:
            if fault == "after":
                self.node.execute(batch)
            self._lose_steps()
            self.scheduler.compute_lost()

    def _lose_steps(self) -> None:
        """Nobody will ever hear of what is in flight."""
        self.node.in_flight.clear()
        self.node.device.crash()
        self.num_lost += 1

    def check_reason(self, release: Release) -> None:
        name = self.memory.sequence_id(release.row)
        if release.reason is ReleaseReason.PREEMPTED:
            assert name in self.preempted
        elif release.reason is ReleaseReason.RESUMED:
            assert self.was_resumed
        else:
            request_id, _, sample = name.partition("@")[0].partition("/")
            (request,) = (found for found in self.requests if found.request_id == request_id)
            if release.reason is ReleaseReason.FAILED and int(sample) > 0 and self.num_lost:
                return  # a child of a fork whose source step was lost: it is forked again
            finish = sink_of(request).finishes[int(sample)]
            assert finish.reason in FINISHES[release.reason]

    # What must hold

    @invariant()
    def books_agree(self) -> None:
        assert check_integrity(self.memory.manager) == []
        assert self.scheduler.num_running <= NUM_ROWS

    @invariant()
    def everybody_is_counted_once(self) -> None:
        num_live = len(self.scheduler.requests)
        assert sum(self.tally.num_finished.values()) + num_live == len(self.requests)
        assert self.scheduler.num_running_requests <= num_live

    def teardown(self) -> None:
        for _ in range(MAX_STEPS):
            if not (self.scheduler.has_work or self.node.in_flight or self.node.unpublished):
                break
            self.node.turn(self.steps_in_flight)
            self.books_agree()
        assert not self.scheduler.has_work
        assert self.memory.manager.pool.num_available == NUM_BLOCKS - 1
        for request in self.requests:
            self._check_end(request)
        self._check_tally()

    def _check_tally(self) -> None:
        outputs = [sink_of(request).token_ids for request in self.requests]
        num_tokens = sum(len(found) for samples in outputs for found in samples.values())
        num_first = sum(len(samples) for samples in outputs)
        assert self.tally.num_output_tokens == num_tokens
        assert self.tally.inter_token_latency.count == num_tokens - num_first
        assert self.tally.time_to_first_token.count == sum(map(bool, outputs))
        assert self.tally.end_to_end.count == len(self.requests)
        admitted = [found for found in self.requests if found.num_cached_tokens >= 0]
        assert self.tally.queue_time.count == len(admitted)
        cached = sum(found.num_cached_tokens for found in admitted)
        assert self.tally.num_cached_prompt_tokens == cached
        for reason, count in self.tally.num_finished.items():
            assert count == sum(found.finish_reason is reason for found in self.requests)

    def _check_end(self, request: Request) -> None:
        sink = sink_of(request)
        assert sorted(sink.finishes) == list(range(request.num_samples))
        assert request.finish_reason is max(finish.reason for finish in sink.finishes.values())
        for sample_index, finish in sink.finishes.items():
            expected = expected_tokens(request, sample_index)
            found = sink.token_ids.get(sample_index, [])
            assert found == expected[: len(found)]
            assert finish.num_output_tokens == len(found)
            if finish.reason is FinishReason.LENGTH:
                assert found == expected
            elif finish.reason is FinishReason.ERROR:
                assert sink.errors
            else:
                assert request in self.aborted
        self._check_error(request)

    def _check_error(self, request: Request) -> None:
        """A request failed for a reason that was there."""
        is_poisoned = POISON in request.prompt_token_ids
        if request in self.aborted:
            assert sink_of(request).errors == []
        elif sink_of(request).errors:
            (error,) = sink_of(request).errors
            if isinstance(error, QuotaExceeded):
                assert num_blocks_alone(request) > self.least_quota[request.tenant]
            else:
                assert isinstance(error, StepFailed)
                assert is_poisoned
        else:
            assert not is_poisoned


class CheckedNode(SimulatedNode):
    """Looks at what passes by."""

    def __init__(
        self, scheduler: Scheduler, memory: SimulatedMemory, machine: SchedulerMachine
    ) -> None:
        super().__init__(scheduler, memory)
        self._machine = machine

    def ask(self, plan: StepPlan) -> MemoryAnswer:
        for release in plan.releases:
            self._machine.check_reason(release)
        return super().ask(plan)

    def admit(self, plan: StepPlan, answer: MemoryAnswer) -> StepBatch | None:
        batch = super().admit(plan, answer)
        self._machine.preempted |= {victim.sequence_id for victim in self.scheduler.victims}
        return batch

    def execute(self, batch: StepBatch) -> None:
        assert sum(batch.work.num_tokens) <= BUDGET
        super().execute(batch)
        self._machine.num_lost += isinstance(self.in_flight[-1][1], StepFailure)


def num_blocks_alone(request: Request) -> int:
    """Most blocks that one of its sequences ever has, or needs with the first copies of its siblings."""
    num_prompt = len(request.prompt_token_ids)
    alone = -(-(num_prompt + request.max_tokens - 1) // SIZE)
    forked = -(-num_prompt // SIZE) + request.num_samples - 1
    return max(alone, forked)


SchedulerMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("QUIRE_TEST_EXAMPLES", "100")),
    stateful_step_count=25,
    deadline=None,
)
test_every_request_ends_with_its_own_tokens = SchedulerMachine.TestCase
