"""Two steps in flight: each rule that makes it safe, met where breaking it would show."""

from __future__ import annotations

import pytest
from simulated_node import SimulatedMemory, SimulatedNode, work_of
from simulated_requests import CollectingSink, expected_tokens, make_request, sink_of

from router.request import FinishReason, Request
from router.scheduler import Scheduler, SchedulerLimits
from router.step import ReleaseReason, StepBatch, StepFailure, StepResult
from router.tally import Tally

SIZE = 4
NUM_ROWS = 6


def make_node(num_blocks: int = 100, budget: int = 64) -> SimulatedNode:
    limits = SchedulerLimits(SIZE, NUM_ROWS, budget, watermark_blocks=0, queue_limit=100)
    memory = SimulatedMemory(num_blocks, SIZE, NUM_ROWS, min_partial_tokens=1)
    return SimulatedNode(Scheduler(limits, Tally()), memory)


def begun(node: SimulatedNode) -> StepBatch:
    batch = node.begin()
    assert batch is not None
    return batch


def ended_well(request: Request) -> bool:
    return sink_of(request).token_ids == {
        index: expected_tokens(request, index) for index in range(request.num_samples)
    }


def test_a_step_begins_on_a_token_that_nobody_has_seen() -> None:
    """The second step runs behind the prompt before the first one ends, and names the output it takes its token from."""
    node = make_node()
    request = make_request("r", [1, 2, 3])
    node.scheduler.add(request)
    first = begun(node)
    second = begun(node)
    assert work_of(second) == [("r/0", 3, 1)]
    assert list(second.pending) == [(first.work.rows[0], first.step, 0)]
    assert sink_of(request).token_ids == {}
    node.run(steps_in_flight=2)
    assert ended_well(request)


def test_nobody_is_planned_behind_its_last_token() -> None:
    """The token that reaches max_tokens is nobody's input: with it pending there is nothing to run."""
    node = make_node()
    request = make_request("r", [1, 2, 3], max_tokens=2)
    node.scheduler.add(request)
    begun(node)
    begun(node)
    assert not node.scheduler.has_work_to_plan
    assert node.begin() is None
    node.run(steps_in_flight=2)
    assert ended_well(request)


def test_what_was_run_behind_a_stop_is_dropped() -> None:
    """A stop is noticed a step late: the extra token is never sent, and its blocks come back."""
    node = make_node()
    request = make_request("r", [1, 2, 3], max_tokens=9)
    expected = expected_tokens(request, 0)
    request.end_token_ids = request.eos_token_ids = frozenset({expected[1]})
    node.scheduler.add(request)
    batches = [begun(node), begun(node)]
    node.end()
    batches.append(begun(node))
    node.end()
    assert request.finish_reason is FinishReason.STOP
    node.end()
    assert [len(batch.outputs) for batch in batches] == [1, 1, 1]
    assert sink_of(request).finishes[0].num_output_tokens == 2
    assert sink_of(request).token_ids[0] == expected[: expected.index(expected[1]) + 1]
    node.run(steps_in_flight=2)
    assert node.memory.manager.pool.num_available == 99


def test_two_tokens_are_reserved_and_never_a_spare_block() -> None:
    """With two steps in flight a table reaches exactly as far as they write."""
    node = make_node()
    node.scheduler.add(make_request("r", [1, 2, 3], max_tokens=30))
    begun(node)
    for _ in range(20):
        batch = begun(node)
        (sequence,) = batch.work.sequences
        assert sequence.num_in_flight_tokens <= 2 or len(sequence.token_ids) == 3
        assert len(sequence.block_table) == -(-sequence.next_position // SIZE)
        node.end()


def test_progress_of_two_steps_is_one_commit() -> None:
    """When both steps end before memory hears of anything, a row is named once, with the tokens of all full blocks."""
    node = make_node(budget=6)
    node.scheduler.add(make_request("r", list(range(12)), max_tokens=4))
    begun(node)
    begun(node)
    node.end()
    node.end()
    plan = node.scheduler.plan()
    assert plan.commits.num_computed_tokens == [12]
    assert [len(token_ids) for token_ids in plan.commits.token_ids] == [12 * 4]
    batch = node.admit(plan, node.ask(plan))
    assert batch is not None
    node.execute(batch)
    node.run(steps_in_flight=2)


def preempt(node: SimulatedNode, request: Request) -> None:
    (sequence,) = request.sequences.values()
    node.scheduler._leave(sequence, ReleaseReason.PREEMPTED)
    node.scheduler._admissions.wait_again(sequence)


def test_a_preempted_sequence_takes_its_token_and_makes_no_progress() -> None:
    """Its token is the next one whatever became of the row; nothing of that row counts as computed any more."""
    node = make_node()
    request = make_request("r", [1, 2, 3])
    node.scheduler.add(request)
    begun(node)
    preempt(node, request)
    node.end()
    (sequence,) = request.sequences.values()
    assert sink_of(request).token_ids[0] == expected_tokens(request, 0)[:1]
    assert (sequence.num_computed_tokens, sequence.next_position) == (0, 0)
    assert not node.scheduler.plan().commits


def test_a_token_of_an_earlier_admission_is_not_taken_twice() -> None:
    """Admitted again before the step ended, the sequence has a row without that token: it is sampled there."""
    node = make_node()
    request = make_request("r", [1, 2, 3])
    node.scheduler.add(request)
    begun(node)
    preempt(node, request)
    begun(node)
    node.end()
    assert sink_of(request).token_ids == {}
    node.run(steps_in_flight=2)
    assert ended_well(request)


def fail_in_flight(node: SimulatedNode) -> None:
    """Let the oldest step fail; those behind it were sent in the epoch that ended with it."""
    node.device.crash()
    batches = [batch for batch, _ in node.in_flight]
    node.in_flight.clear()
    for number, batch in enumerate(batches):
        failure = StepFailure(batch.step, "" if number else "a passing fault")
        node.in_flight.append((batch, failure))


def test_steps_behind_a_failed_one_are_rolled_back_with_it() -> None:
    """Two answers tell of one failure, which is forgiven; then all runs again from what was acknowledged, as a reset."""
    node = make_node()
    request, other = make_request("r", [1, 2, 3]), make_request("other", [7, 8])
    node.scheduler.add(request)
    node.scheduler.add(other)
    begun(node)
    begun(node)
    node.end()
    begun(node)
    fail_in_flight(node)
    node.end()
    node.end()
    assert sink_of(request).errors == sink_of(other).errors == []
    assert not node.scheduler.may_overlap
    again = begun(node)
    assert again.reset
    assert sorted(work_of(again)) == [("other/0", 2, 1), ("r/0", 3, 1)]
    node.run(steps_in_flight=2)
    assert ended_well(request)
    assert ended_well(other)


def test_a_step_sent_before_a_failure_was_heard_of_costs_nothing_more() -> None:
    """It went out after the device failed and before the router knew: it is discarded, and nobody is suspected for it."""
    node = make_node()
    request = make_request("r", [1, 2, 3])
    node.scheduler.add(request)
    begun(node)
    fail_in_flight(node)
    late = begun(node)
    assert not late.reset
    assert isinstance(node.in_flight[-1][1], StepFailure)
    node.end()
    node.end()
    assert node.scheduler._isolation.suspects() is None
    node.run(steps_in_flight=2)
    assert ended_well(request)


def cached_node() -> SimulatedNode:
    node = make_node()
    node.scheduler.add(make_request("before", list(range(9)), max_tokens=1))
    node.run()
    return node


def test_copies_of_all_lost_steps_are_sent_again_in_order() -> None:
    """Two steps with a copy each are lost: the reset makes both, the older first, and their sources stay pinned."""
    node = cached_node()
    first = make_request("first", [*range(6), 50, 51], max_tokens=4)
    node.scheduler.add(first)
    copies = begun(node).copies
    second = make_request("second", [*range(5), 60, 61], max_tokens=4)
    node.scheduler.add(second)
    copies += begun(node).copies
    assert len(copies) == 2
    fail_in_flight(node)
    node.end()
    node.end()
    assert begun(node).copies == copies
    node.run(steps_in_flight=2)
    assert ended_well(first)
    assert ended_well(second)
    assert node.memory.manager.pool.num_available == 99


def test_siblings_begin_on_tokens_that_are_on_the_device() -> None:
    """The step behind the prompt forks them all, from outputs of a step that has not ended."""
    node = make_node()
    request = make_request("r", list(range(10)), max_tokens=3, num_samples=3)
    node.scheduler.add(request)
    first = begun(node)
    second = begun(node)
    assert [(fork.source_step, fork.source_output) for fork in second.forks] == [
        (first.step, 1),
        (first.step, 2),
    ]
    assert sorted(work_of(second)) == [("r/0", 10, 1), ("r/1", 10, 1), ("r/2", 10, 1)]
    node.run(steps_in_flight=2)
    assert ended_well(request)
    assert node.memory.manager.pool.num_available == 99


def test_siblings_of_a_lost_prompt_are_forked_again() -> None:
    """The step that sampled them failed after memory forked them: their rows go back, and they begin once more."""
    node = make_node()
    request = make_request("r", list(range(10)), max_tokens=3, num_samples=3)
    node.scheduler.add(request)
    begun(node)
    begun(node)
    fail_in_flight(node)
    node.end()
    node.end()
    assert set(request.sequences) == {0}
    plan = node.scheduler.plan()
    assert {release.reason for release in plan.releases} == {ReleaseReason.FAILED}
    batch = node.admit(plan, node.ask(plan))
    assert batch is not None
    node.execute(batch)
    node.run(steps_in_flight=2)
    assert ended_well(request)
    assert node.memory.manager.pool.num_available == 99


def test_a_parent_that_loses_its_row_is_still_forked_from() -> None:
    """Preempted in the step in which its children begin, it is dropped by compute a step later than they are made."""
    node = make_node()
    request = make_request("r", list(range(10)), max_tokens=3, num_samples=2)
    node.scheduler.add(request)
    begun(node)
    plan = node.scheduler.plan()
    answer = node.ask(plan)
    parent = request.sequences[0]
    row = parent.row
    node.scheduler._leave(parent, ReleaseReason.PREEMPTED)
    node.scheduler._admissions.wait_again(parent)
    batch = node.admit(plan, answer)
    assert batch is not None
    assert [fork.parent_row for fork in batch.forks] == [row]
    assert batch.drop_rows == []
    node.execute(batch)
    assert row in begun(node).drop_rows
    node.run(steps_in_flight=2)
    assert ended_well(request)


def test_the_order_of_results_is_the_order_of_steps() -> None:
    """A result that came out of order would be of a token that is not the next one: it is not taken."""
    node = make_node()
    request = make_request("r", [1, 2, 3])
    node.scheduler.add(request)
    begun(node)
    begun(node)
    (batch, result) = node.in_flight[1]
    assert isinstance(result, StepResult)
    (output,) = batch.outputs
    assert not output.sequence.goes_on_at(output.position, output.incarnation)
    node.end()
    assert output.sequence.goes_on_at(output.position, output.incarnation)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_tokens_do_not_depend_on_how_many_steps_are_in_flight(steps_in_flight: int) -> None:
    """A crowd that has to be preempted ends with the tokens that each would have had alone."""
    node = make_node(num_blocks=12)
    requests = [make_request(f"r{n}", [n] * 5, max_tokens=12, num_samples=2) for n in range(6)]
    for request in requests:
        node.scheduler.add(request)
    node.run(steps_in_flight)
    assert node.scheduler._tally.num_preemptions > 0
    assert all(map(ended_well, requests))
    assert all(isinstance(request.sink, CollectingSink) for request in requests)
