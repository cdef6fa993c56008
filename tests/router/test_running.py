"""What memory is told of rows: why each is given up; and copies that come with an admission."""

from __future__ import annotations

from simulated_node import POISON, SimulatedMemory, SimulatedNode
from simulated_requests import expected_tokens, make_request, sink_of

from router.scheduler import Scheduler, SchedulerLimits
from router.step import ReleaseReason, StepBatch, StepFailure
from router.tally import Tally

SIZE = 4
NUM_ROWS = 4


def make_node(num_blocks: int = 100) -> SimulatedNode:
    limits = SchedulerLimits(SIZE, NUM_ROWS, 64, watermark_blocks=0, queue_limit=100)
    memory = SimulatedMemory(num_blocks, SIZE, NUM_ROWS, min_partial_tokens=1)
    return SimulatedNode(Scheduler(limits, Tally()), memory)


def reasons_told(node: SimulatedNode) -> list[ReleaseReason]:
    """Carry the next plan to memory; the reasons in it."""
    plan = node.scheduler.plan()
    answer = node.memory.allocate(plan)
    assert node.scheduler.admit(plan, answer) is None
    node.scheduler.skip(plan)
    return [release.reason for release in plan.releases]


def test_an_end_and_a_cancellation_are_told_apart() -> None:
    """FINISHED for who reached its end, CANCELLED for who was aborted."""
    node = make_node()
    short, long = make_request("short", [1], max_tokens=1), make_request("long", [2], max_tokens=9)
    node.scheduler.add(short)
    node.scheduler.add(long)
    node.step()
    node.scheduler.abort(long)
    assert reasons_told(node) == [ReleaseReason.FINISHED, ReleaseReason.CANCELLED]


def test_who_cannot_be_run_is_failed() -> None:
    """Whoever makes steps fail is released as FAILED."""
    node = make_node()
    node.scheduler.add(make_request("guilty", [1, POISON]))
    for _ in range(2):
        plan = node.scheduler.plan()
        batch = node.scheduler.admit(plan, node.memory.allocate(plan))
        assert batch is not None
        failure = node.device.execute(batch)
        assert isinstance(failure, StepFailure)
        node.scheduler.fail(batch, failure)
    assert reasons_told(node) == [ReleaseReason.FAILED]


def test_a_victim_is_preempted() -> None:
    """Who lost its row for others is released as PREEMPTED."""
    node = make_node(num_blocks=6)
    node.scheduler.add(make_request("urgent", list(range(8)), max_tokens=12))
    node.scheduler.add(make_request("victim", list(range(20, 28)), max_tokens=12, priority=1))
    while not node.scheduler.victims:
        node.step()
    plan = node.scheduler.plan()
    assert [release.reason for release in plan.releases] == [ReleaseReason.PREEMPTED]


def test_who_leaves_before_memory_heard_of_its_progress_leaves_it_to_the_cache() -> None:
    """Aborted between the end of a step and the next plan: the blocks that the step filled are hit by the next one."""
    node = make_node()
    request = make_request("leaves", list(range(9)))
    node.scheduler.add(request)
    node.begin()
    node.end()
    node.scheduler.abort(request)
    other = make_request("hits", list(range(9)))
    node.scheduler.add(other)
    node.run()
    assert other.num_cached_tokens == 8


def test_a_resumed_session_gives_all_back() -> None:
    """Rows of who goes on are RESUMED; who had ended before the stream broke, unheard, is FINISHED still."""
    node = make_node()
    node.scheduler.add(make_request("short", [1], max_tokens=1))
    node.scheduler.add(make_request("long", [2], max_tokens=9))
    node.step()
    node.scheduler.session_resumed(node.memory.held_rows())
    plan = node.scheduler.plan()
    assert sorted(release.reason.name for release in plan.releases) == ["FINISHED", "RESUMED"]


def test_who_was_aborted_while_memory_was_asked_is_cancelled() -> None:
    """Who was aborted while memory was being asked, and came in, is released as CANCELLED."""
    node = make_node()
    request = make_request("r", [1, 2, 3])
    node.scheduler.add(request)
    plan = node.scheduler.plan()
    answer = node.memory.allocate(plan)
    node.scheduler.abort(request)
    assert node.scheduler.admit(plan, answer) is None
    node.scheduler.skip(plan)
    assert reasons_told(node) == [ReleaseReason.CANCELLED]
    assert node.memory.manager.num_sequences == 0


def partly_cached_node() -> SimulatedNode:
    """Cached: blocks of 0 to 3 and 4 to 7."""
    node = make_node()
    node.scheduler.add(make_request("before", list(range(9)), max_tokens=1))
    node.run()
    return node


def planned(node: SimulatedNode) -> StepBatch:
    plan = node.scheduler.plan()
    batch = node.scheduler.admit(plan, node.memory.allocate(plan))
    assert batch is not None
    return batch


def test_a_hit_may_end_within_a_block() -> None:
    """The sequence goes on behind the copied tokens, in the same step as the copy."""
    node = partly_cached_node()
    request = make_request("r", [*range(6), 50, 51, 52], max_tokens=4)
    node.scheduler.add(request)
    batch = planned(node)
    assert [(work.start, work.num_tokens) for work in batch.work] == [(6, 3)]
    ((source, target),) = batch.copies
    assert target == batch.new_rows[0].block_table[1] != source
    node.device.execute(batch)
    node.device.crash()
    node.scheduler.compute_lost()
    node.run()
    assert request.num_cached_tokens == 6
    assert sink_of(request).token_ids[0] == expected_tokens(request, 0)
    assert node.memory.manager.pool.num_available == 99


def test_a_lost_step_sends_the_copy_again() -> None:
    """Nobody heard whether the copy was made: the reset names it again, before the same tokens."""
    node = partly_cached_node()
    node.scheduler.add(make_request("r", [*range(6), 50, 51, 52], max_tokens=4))
    lost = planned(node)
    node.device.crash()
    node.scheduler.compute_lost()
    again = planned(node)
    assert again.reset
    assert again.copies == lost.copies
    assert [(work.start, work.num_tokens) for work in again.work] == [(6, 3)]


def test_a_copy_that_nobody_waits_for_leaves_no_pin() -> None:
    """Aborted before its first step was planned, run or heard: the copy's source is free for others again."""
    for moment in ("asked", "admitted", "lost"):
        node = partly_cached_node()
        request = make_request("r", [*range(6), 50, 51, 52], max_tokens=4)
        node.scheduler.add(request)
        plan = node.scheduler.plan()
        answer = node.memory.allocate(plan)
        assert answer.copies
        if moment == "asked":
            node.scheduler.abort(request)
        if node.scheduler.admit(plan, answer) is None:
            node.scheduler.skip(plan)
        else:
            node.device.crash()
            node.scheduler.compute_lost()
            if moment == "lost":
                planned(node)
                node.scheduler.compute_lost()
            node.scheduler.abort(request)
        node.run()
        assert node.memory.manager.pool.num_available == 99, moment
