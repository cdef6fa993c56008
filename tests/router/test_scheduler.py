"""The scheduler over the real block manager, step by step."""

from __future__ import annotations

import pytest
from simulated_node import SimulatedMemory, SimulatedNode
from simulated_requests import expected_tokens, make_request, sink_of

from quire.errors import QueueFull, RequestIdInUse
from router.preemption import choose_victims
from router.request import FinishReason, Sequence, first_sequence
from router.requests import RequestTable
from router.scheduler import Scheduler, SchedulerLimits
from router.step import StepFailure, StepResult
from router.tally import Tally

SIZE = 4
NUM_ROWS = 6


def make_scheduler(
    budget: int = 7, watermark: int = 1, queue_limit: int = 100, num_rows: int = NUM_ROWS
) -> Scheduler:
    limits = SchedulerLimits(SIZE, num_rows, budget, watermark, queue_limit)
    return Scheduler(limits, Tally())


def node_of(scheduler: Scheduler, num_blocks: int = 100) -> SimulatedNode:
    return SimulatedNode(scheduler, SimulatedMemory(num_blocks, SIZE, NUM_ROWS))


def test_decodes_and_chunks_share_the_token_budget() -> None:
    """A running sequence decodes in each step; a long prompt fills what is left of the budget."""
    node = node_of(make_scheduler(budget=7))
    node.scheduler.add(make_request("a", [1, 2, 3]))
    assert node.step() == [("a/0", 0, 3)]
    node.scheduler.add(make_request("b", list(range(10, 20))))
    assert node.step() == [("a/0", 3, 1), ("b/0", 0, 6)]
    assert node.step() == [("a/0", 4, 1), ("b/0", 6, 4)]


def test_the_urgent_request_is_admitted_first() -> None:
    """Lower numbers of priority go first, whoever came first."""
    node = node_of(make_scheduler(num_rows=1))
    node.scheduler.add(make_request("late", [1, 2], max_tokens=1, priority=1))
    node.scheduler.add(make_request("early", [3, 4], max_tokens=1, priority=-1))
    assert node.step() == [("early/0", 0, 2)]


def test_the_least_urgent_is_preempted_and_goes_on_from_its_prefix() -> None:
    """When blocks run out the least urgent loses its row, waits, and ends with the same tokens."""
    node = node_of(make_scheduler(budget=64, watermark=0), num_blocks=8)
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
    node = node_of(make_scheduler())
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
    node = node_of(make_scheduler())
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
    node.scheduler.acknowledge(batch)
    node.scheduler.take_outputs(batch, late)
    assert sink_of(request).token_ids == {}
    result = node.device.execute(again)
    assert isinstance(result, StepResult)
    node.scheduler.acknowledge(again)
    node.scheduler.take_outputs(again, result)
    node.run()
    assert sink_of(request).token_ids[0] == expected_tokens(request, 0)


def test_siblings_are_forked_from_one_prompt() -> None:
    """The prompt runs once; each sample then has a row of its own and its own tokens."""
    node = node_of(make_scheduler(budget=64))
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
    node = node_of(make_scheduler())
    node.scheduler.add(make_request("a", [1]))
    with pytest.raises(RequestIdInUse):
        node.scheduler.add(make_request("a", [2]))
    node.run()
    node.scheduler.add(make_request("a", [2]))
    node.run()


def test_a_lost_answer_loses_no_request() -> None:
    """Who was being admitted when the stream broke waits again and ends with its own tokens."""
    node = node_of(make_scheduler())
    request = make_request("a", [1, 2, 3])
    node.scheduler.add(request)
    node.memory.allocate(node.scheduler.plan())
    node.scheduler.session_resumed(node.memory.held_rows())
    node.run()
    assert sink_of(request).token_ids[0] == expected_tokens(request, 0)


def test_a_lost_copy_leaves_no_pin_behind() -> None:
    """A copy whose step was lost, and whose sequences then gave up, does not keep its source from the pool."""
    node = node_of(make_scheduler())
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
