"""The scheduler over the real block manager, with aborts, failing steps and lost replies at any point."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from simulated_node import POISON, SimulatedDevice, SimulatedMemory, next_token
from simulated_requests import CollectingSink, make_request

from memory_service.integrity import check_integrity
from quire.errors import QueueFull, RequestIdInUse, StepFailed
from router.preemption import choose_victims
from router.request import FinishReason, Request, Sequence, first_sequence
from router.requests import RequestTable
from router.scheduler import Scheduler, SchedulerLimits
from router.step import StepFailure, StepResult
from router.tally import Tally

if TYPE_CHECKING:
    from router.step import StepBatch

SIZE = 4
NUM_BLOCKS = 15
NUM_ROWS = 6
MAX_STEPS = 2000


def make_scheduler(
    budget: int = 7, watermark: int = 1, queue_limit: int = 100, num_rows: int = NUM_ROWS
) -> Scheduler:
    limits = SchedulerLimits(SIZE, num_rows, budget, watermark, queue_limit)
    return Scheduler(limits, Tally())


def expected_tokens(request: Request, sample_index: int) -> list[int]:
    """The output without any neighbour, batch or fault."""
    token_ids = tuple(request.prompt_token_ids)
    for _ in range(request.max_tokens):
        token_ids += (next_token(token_ids, sample_index),)
    return list(token_ids[len(request.prompt_token_ids) :])


def sink_of(request: Request) -> CollectingSink:
    assert isinstance(request.sink, CollectingSink)
    return request.sink


class SchedulerMachine(RuleBasedStateMachine):
    """Whatever happens between steps, every request ends once, with the tokens that it would have had alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler()
        self.tally = self.scheduler._tally
        self.memory = SimulatedMemory(NUM_BLOCKS, SIZE, NUM_ROWS)
        self.device = SimulatedDevice(SIZE)
        self.requests: list[Request] = []
        self.aborted: set[str] = set()

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=22),
        max_tokens=st.integers(1, 12),
        num_samples=st.integers(1, 4),
        priority=st.integers(-1, 1),
    )
    def add(self, prompt: list[int], max_tokens: int, num_samples: int, priority: int) -> None:
        name = f"r{len(self.requests)}"
        request = make_request(name, prompt, max_tokens, num_samples, priority)
        self.requests.append(request)
        self.scheduler.add(request)

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9), at=st.integers(0, 8))
    def add_poisoned(self, prompt: list[int], at: int) -> None:
        prompt.insert(min(at, len(prompt)), POISON)
        self.requests.append(make_request(f"r{len(self.requests)}", prompt))
        self.scheduler.add(self.requests[-1])

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        if not request.is_finished:
            self.aborted.add(request.request_id)
            self.scheduler.abort(request)
            assert request.is_finished

    @rule(count=st.integers(1, 6))
    def run_steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @precondition(lambda self: self.scheduler.has_work)
    @rule(fault=st.sampled_from(["before", "after", "answer", "abort"]), data=st.data())
    def run_faulty_step(self, fault: str, data: st.DataObject) -> None:
        """A step that fails on the device, ends unheard, whose answer is lost, or beside which somebody gives up."""
        plan = self.scheduler.plan()
        answer = self.memory.allocate(plan)
        if fault == "answer":
            self.device.crash()
            self.scheduler.session_resumed(self.memory.held_rows())
            return
        if fault == "abort":
            self.abort(data)
        batch = self.scheduler.admit(plan, answer)
        if batch is None:
            self.scheduler.skip(plan)
        elif fault == "abort":
            self._take(batch)
        else:
            if fault == "after":
                self.device.execute(batch)
            self.device.crash()
            self.scheduler.compute_lost()

    def step(self) -> None:
        plan = self.scheduler.plan()
        batch = self.scheduler.admit(plan, self.memory.allocate(plan))
        if batch is None:
            self.scheduler.skip(plan)
        else:
            self._take(batch)

    def _take(self, batch: StepBatch) -> None:
        assert sum(work.num_tokens for work in batch.work) <= 7
        outcome = self.device.execute(batch)
        if isinstance(outcome, StepFailure):
            self.scheduler.fail(batch, outcome)
        else:
            self.scheduler.apply(batch, outcome)

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
            if not self.scheduler.has_work:
                break
            self.step()
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
        is_poisoned = POISON in request.prompt_token_ids
        for sample_index, finish in sink.finishes.items():
            expected = expected_tokens(request, sample_index)
            found = sink.token_ids.get(sample_index, [])
            assert found == expected[: len(found)]
            assert finish.num_output_tokens == len(found)
            if finish.reason is FinishReason.LENGTH:
                assert found == expected
            elif finish.reason is FinishReason.ERROR:
                assert is_poisoned
            else:
                assert request.request_id in self.aborted
        assert bool(sink.errors) == (is_poisoned and request.request_id not in self.aborted)
        assert all(isinstance(error, StepFailed) for error in sink.errors)


SchedulerMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("QUIRE_TEST_EXAMPLES", "150")),
    stateful_step_count=25,
    deadline=None,
)
test_every_request_ends_with_its_own_tokens = SchedulerMachine.TestCase


class Node:
    """A scheduler with the simulated node under it."""

    def __init__(self, scheduler: Scheduler, num_blocks: int = 100) -> None:
        self.scheduler = scheduler
        self.memory = SimulatedMemory(num_blocks, SIZE, NUM_ROWS)
        self.device = SimulatedDevice(SIZE)

    def step(self) -> list[tuple[str, int, int]]:
        """Run a step; (sequence, start, tokens) of its work."""
        plan = self.scheduler.plan()
        batch = self.scheduler.admit(plan, self.memory.allocate(plan))
        if batch is None:
            self.scheduler.skip(plan)
            return []
        work = [(found.sequence.sequence_id, found.start, found.num_tokens) for found in batch.work]
        outcome = self.device.execute(batch)
        assert not isinstance(outcome, StepFailure)
        self.scheduler.apply(batch, outcome)
        return work

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()


def test_decodes_and_chunks_share_the_token_budget() -> None:
    """A running sequence decodes in each step; a long prompt fills what is left of the budget."""
    node = Node(make_scheduler(budget=7))
    node.scheduler.add(make_request("a", [1, 2, 3]))
    assert node.step() == [("a/0", 0, 3)]
    node.scheduler.add(make_request("b", list(range(10, 20))))
    assert node.step() == [("a/0", 3, 1), ("b/0", 0, 6)]
    assert node.step() == [("a/0", 4, 1), ("b/0", 6, 4)]


def test_the_urgent_request_is_admitted_first() -> None:
    """Lower numbers of priority go first, whoever came first."""
    node = Node(make_scheduler(num_rows=1))
    node.scheduler.add(make_request("late", [1, 2], max_tokens=1, priority=1))
    node.scheduler.add(make_request("early", [3, 4], max_tokens=1, priority=-1))
    assert node.step() == [("early/0", 0, 2)]


def test_the_least_urgent_is_preempted_and_goes_on_from_its_prefix() -> None:
    """When blocks run out the least urgent loses its row, waits, and ends with the same tokens."""
    node = Node(make_scheduler(budget=64, watermark=0), num_blocks=8)
    urgent = make_request("urgent", list(range(12)), max_tokens=14)
    other = make_request("other", list(range(20, 32)), max_tokens=8, priority=1)
    node.scheduler.add(urgent)
    node.scheduler.add(other)
    node.run()
    assert node.scheduler._tally.num_preemptions > 0
    for request in (urgent, other):
        assert sink_of(request).token_ids[0] == expected_tokens(request, 0)


def running(name: str, num_blocks: int, num_computed: int, priority: int = 0) -> Sequence:
    sequence = first_sequence(make_request(name, [1], priority=priority))
    sequence.row = ord(name)
    sequence.block_table = list(range(1, num_blocks + 1))
    sequence.num_computed_tokens = num_computed
    return sequence


def names_of_victims(sequences: list[Sequence], missing: dict[str, int]) -> list[str]:
    found = choose_victims(sequences, {ord(name): count for name, count in missing.items()})
    return [victim.request.request_id for victim in found]


def test_victims_are_the_least_urgent_then_the_least_computed() -> None:
    """Priority decides before progress, and no more are taken than blocks are missing."""
    a, b = running("a", 3, 40), running("b", 3, 20)
    c = running("c", 1, 90, priority=1)
    assert names_of_victims([a, b, c], {"a": 1}) == ["c"]
    assert names_of_victims([a, b, c], {"a": 3}) == ["c", "b"]
    # What a victim lacked itself is not missing any more.
    assert names_of_victims([a, b, c], {"a": 1, "c": 2}) == ["c"]


def test_the_most_urgent_is_never_preempted() -> None:
    """Somebody always goes on, however much is missing."""
    assert names_of_victims([running("a", 1, 5)], {"a": 9}) == []
    assert names_of_victims([running("a", 1, 5), running("b", 1, 4)], {"a": 9, "b": 9}) == ["b"]


def test_a_step_that_fails_once_is_nobodys_fault() -> None:
    """The first failure is forgiven: the same step runs again and the request ends as it should."""
    node = Node(make_scheduler())
    request = make_request("a", [1, 2, 3])
    node.scheduler.add(request)
    plan = node.scheduler.plan()
    batch = node.scheduler.admit(plan, node.memory.allocate(plan))
    assert batch is not None
    node.device.crash()
    node.scheduler.fail(batch, StepFailure(batch.step, "a passing fault"))
    node.run()
    assert sink_of(request).errors == []
    assert sink_of(request).token_ids[0] == expected_tokens(request, 0)


def test_a_result_of_an_earlier_admission_changes_nothing() -> None:
    """Once a sequence was admitted again, the result of a step before that neither adds a token nor advances it."""
    node = Node(make_scheduler())
    request = make_request("a", [1, 2, 3])
    node.scheduler.add(request)
    plan = node.scheduler.plan()
    batch = node.scheduler.admit(plan, node.memory.allocate(plan))
    assert batch is not None
    late = node.device.execute(batch)
    assert isinstance(late, StepResult)
    node.scheduler.session_resumed(node.memory.held_rows())
    node.device.crash()
    plan = node.scheduler.plan()
    again = node.scheduler.admit(plan, node.memory.allocate(plan))
    assert again is not None
    node.scheduler.apply(batch, late)
    assert sink_of(request).token_ids == {}
    result = node.device.execute(again)
    assert isinstance(result, StepResult)
    node.scheduler.apply(again, result)
    node.run()
    assert sink_of(request).token_ids[0] == expected_tokens(request, 0)


def test_siblings_are_forked_from_one_prompt() -> None:
    """The prompt runs once; each sample then has a row of its own and its own tokens."""
    node = Node(make_scheduler(budget=64))
    request = make_request("r", list(range(10)), max_tokens=3, num_samples=3)
    node.scheduler.add(request)
    assert node.step() == [("r/0", 0, 10)]
    assert sorted(node.step()) == [("r/0", 10, 1), ("r/1", 10, 1), ("r/2", 10, 1)]
    node.run()
    found = sink_of(request).token_ids
    assert found == {index: expected_tokens(request, index) for index in range(3)}


def test_a_full_queue_refuses_with_a_time_to_wait() -> None:
    """One more than may wait is QueueFull, with when to come again; nothing of it stays."""
    scheduler = make_scheduler(queue_limit=2)
    scheduler.add(make_request("a", [1]))
    scheduler.add(make_request("b", [1]))
    with pytest.raises(QueueFull) as caught:
        scheduler.add(make_request("c", [1]))
    assert caught.value.retry_after_s
    assert len(scheduler.requests) == 2


def test_the_time_to_wait_is_that_between_two_ends() -> None:
    """When a request ends every half second, a place is promised in half a second."""
    now = 0.0
    table = RequestTable(queue_limit=1, clock=lambda: now)
    for number in range(20):
        request = make_request(f"r{number}", [1])
        table.add(request)
        table.waiting.remove(request.sequences[0])
        request.finish_sample(0, FinishReason.STOP)
        now += 0.5
        table.forget_if_finished(request)
    table.add(make_request("a", [1]))
    with pytest.raises(QueueFull) as caught:
        table.add(make_request("b", [1]))
    assert caught.value.retry_after_s == pytest.approx(0.5, rel=0.1)


def test_an_id_is_free_again_after_its_end() -> None:
    """A live id is refused; after the end it may be used again."""
    node = Node(make_scheduler())
    node.scheduler.add(make_request("a", [1]))
    with pytest.raises(RequestIdInUse):
        node.scheduler.add(make_request("a", [2]))
    node.run()
    node.scheduler.add(make_request("a", [2]))
    node.run()


def test_a_lost_answer_loses_no_request() -> None:
    """Who was being admitted when the stream broke waits again and ends with its own tokens."""
    node = Node(make_scheduler())
    request = make_request("a", [1, 2, 3])
    node.scheduler.add(request)
    node.memory.allocate(node.scheduler.plan())
    node.scheduler.session_resumed(node.memory.held_rows())
    node.run()
    assert sink_of(request).token_ids[0] == expected_tokens(request, 0)


def test_a_lost_copy_leaves_no_pin_behind() -> None:
    """A copy whose step was lost, and whose sequences then gave up, does not keep its source from the pool."""
    node = Node(make_scheduler())
    request = make_request("a", [1], num_samples=2)
    node.scheduler.add(request)
    node.step()
    plan = node.scheduler.plan()
    batch = node.scheduler.admit(plan, node.memory.allocate(plan))
    assert batch is not None
    assert batch.copies
    node.device.crash()
    node.scheduler.compute_lost()
    node.scheduler.abort(request)
    node.run()
    assert node.memory.manager.pool.num_available == 99
