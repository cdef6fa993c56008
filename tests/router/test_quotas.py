"""Tenants at their quota: who makes room, who waits, who is sent away, and that nobody else notices."""

from __future__ import annotations

from simulated_node import SimulatedMemory, SimulatedNode
from simulated_requests import expected_tokens, make_request, sink_of

from quire.errors import QuotaExceeded
from router.admissions import QUOTA_RETRY_STEPS
from router.preemption import victims_of
from router.request import FinishReason, Request, Sequence, first_sequence
from router.scheduler import Scheduler, SchedulerLimits
from router.step import MemoryAnswer, RefusalReason, Work
from router.tally import Tally

SIZE = 4
NUM_ROWS = 4


def node_with(quotas: dict[str, int], num_blocks: int = 100) -> SimulatedNode:
    limits = SchedulerLimits(SIZE, NUM_ROWS, 64, watermark_blocks=0, queue_limit=100)
    node = SimulatedNode(Scheduler(limits, Tally()), SimulatedMemory(num_blocks, SIZE, NUM_ROWS, 1))
    for tenant, quota in quotas.items():
        node.memory.set_hard_quota(tenant, quota)
    return node


def ended_well(request: Request) -> bool:
    return sink_of(request).token_ids == {
        index: expected_tokens(request, index) for index in range(request.num_samples)
    }


def test_a_tenant_makes_room_for_itself() -> None:
    """Over its quota the least urgent of its own sequences is preempted, however much less urgent another's is."""
    node = node_with({"a": 6})
    first = make_request("first", list(range(8)), max_tokens=12, tenant="a")
    second = make_request("second", list(range(20, 28)), max_tokens=8, tenant="a")
    other = make_request("other", list(range(40, 48)), max_tokens=12, priority=9, tenant="b")
    for request in (first, second, other):
        node.scheduler.add(request)
    victims: set[str] = set()
    for _ in range(60):
        node.step()
        victims |= {found.sequence_id for found in node.scheduler.victims}
    assert victims == {"second/0@a"}
    assert all(map(ended_well, (first, second, other)))


def test_who_outgrows_the_quota_alone_is_ended() -> None:
    """Its client gets what was generated and QUOTA_EXCEEDED with the tenant; its blocks return with the next plan."""
    node = node_with({"a": 2})
    request = make_request("r", [1, 2, 3], max_tokens=20, tenant="a")
    other = make_request("other", [1, 2, 3], max_tokens=20, tenant="b")
    node.scheduler.add(request)
    node.scheduler.add(other)
    while not request.is_finished:
        node.step()
    (error,) = sink_of(request).errors
    assert isinstance(error, QuotaExceeded)
    assert error.metadata == {"tenant": "a"}
    assert "hard quota of tenant 'a'" in error.message
    assert sink_of(request).finishes[0].reason is FinishReason.ERROR
    # Two blocks hold the prompt and all but the last token.
    assert sink_of(request).token_ids[0] == expected_tokens(request, 0)[:6]
    assert [found.sequence_id for found in node.scheduler._running] == ["other/0@b"]
    node.run()
    assert ended_well(other)
    assert node.memory.manager.pool.num_available == 99


def test_who_can_never_come_in_is_ended_at_once() -> None:
    """A prompt larger than the quota does not wait; it leaves nothing behind, and the next one of its tenant comes in."""
    node = node_with({"a": 2})
    large = make_request("large", list(range(9)), tenant="a")
    small = make_request("small", [1, 2, 3], max_tokens=2, tenant="a")
    node.scheduler.add(large)
    node.scheduler.add(small)
    node.step()
    assert isinstance(sink_of(large).errors[0], QuotaExceeded)
    assert large.num_cached_tokens == -1
    node.run()
    assert ended_well(small)
    assert node.scheduler.num_waiting == 0


def test_who_waits_for_its_quota_is_overtaken() -> None:
    """A later request of another tenant runs meanwhile; the earlier one comes in when its tenant has given blocks up."""
    node = node_with({"a": 3})
    first = make_request("first", list(range(8)), max_tokens=3, tenant="a")
    second = make_request("second", list(range(20, 28)), max_tokens=3, tenant="a")
    other = make_request("other", list(range(40, 48)), max_tokens=3, tenant="b")
    for request in (first, second, other):
        node.scheduler.add(request)
    assert [name for name, _, _ in node.step()] == ["first/0@a", "other/0@b"]
    while not first.is_finished:
        node.step()
    assert [name for name, _, _ in node.step()] == ["second/0@a"]
    node.run()
    assert all(map(ended_well, (first, second, other)))


def test_a_long_queue_of_one_tenant_leaves_room_in_the_message() -> None:
    """More wait for their quota than one message names: who came after them all is asked about in the next step."""
    node = node_with({"a": 3})
    many = [make_request(f"a{n}", [n] * 8, max_tokens=2, tenant="a") for n in range(40)]
    late = make_request("late", [90] * 8, max_tokens=2, tenant="b")
    for request in [*many, late]:
        node.scheduler.add(request)
    assert [name for name, _, _ in node.step()] == ["a0/0@a"]
    assert "late/0@b" in [name for name, _, _ in node.step()]
    node.run()
    assert all(map(ended_well, [*many, late]))


def test_a_wide_request_that_waits_for_its_quota_leaves_its_rows() -> None:
    """It would take every row; while its tenant has no blocks for it, others run in them."""
    node = node_with({"a": 5})
    running = make_request("running", list(range(8)), max_tokens=10, tenant="a")
    node.scheduler.add(running)
    node.step()
    wide = make_request("wide", list(range(20, 27)), max_tokens=2, num_samples=3, tenant="a")
    late = make_request("late", [90] * 8, max_tokens=2, tenant="b")
    node.scheduler.add(wide)
    node.scheduler.add(late)
    names = {name for _ in range(2) for name, _, _ in node.step()}
    assert "late/0@b" in names
    assert wide.num_cached_tokens == -1
    node.run()
    assert all(map(ended_well, (running, wide, late)))


def test_a_raised_quota_is_noticed() -> None:
    """Nobody of the tenant runs who could give blocks up: it is asked about again all the same, soon."""
    node = node_with({"a": 3})
    request = make_request("r", list(range(8)), max_tokens=40, tenant="a")
    waiting = make_request("waiting", list(range(20, 28)), max_tokens=2, tenant="a")
    node.scheduler.add(request)
    node.scheduler.add(waiting)
    node.step()
    node.memory.set_hard_quota("a", None)
    for _ in range(QUOTA_RETRY_STEPS):
        node.step()
    assert waiting.num_cached_tokens == 0
    node.run()
    assert all(map(ended_well, (request, waiting)))


def running(name: str, tenant: str, priority: int = 0) -> Sequence:
    sequence = first_sequence(make_request(name, [1], priority=priority, tenant=tenant))
    sequence.row = ord(name)
    sequence.block_table = [1, 2]
    return sequence


def names_of_victims(sequences: list[Sequence], refusals: dict[str, RefusalReason]) -> list[str]:
    by_row = {ord(name): reason for name, reason in refusals.items()}
    refused = [Work(found, 1, found.row, 8, 1) for found in sequences if found.row in by_row]
    answer = MemoryAnswer(1, {}, [], {}, [], [], by_row, 0)
    return [found.request.request_id for found in victims_of(refused, sequences, answer, SIZE)]


def test_each_tenant_over_its_quota_has_its_own_victim() -> None:
    """Two at once: the least urgent of each, and a tenant with one sequence has none to give."""
    sequences = [running("p", "a"), running("q", "a", 1), running("r", "b"), running("s", "b", 1)]
    sequences.append(running("t", "c", 9))
    over = RefusalReason.OVER_QUOTA
    assert names_of_victims(sequences, {"p": over, "r": over, "t": over}) == ["q", "s"]
    assert names_of_victims(sequences, {"t": over}) == []


def test_room_for_a_quota_may_be_room_for_all() -> None:
    """Blocks that a quota frees are free for everybody: nobody else is preempted before memory was asked again."""
    sequences = [running("p", "a"), running("q", "a", 1), running("r", "b"), running("s", "b", 1)]
    refusals = {"p": RefusalReason.OVER_QUOTA, "r": RefusalReason.NO_BLOCKS}
    assert names_of_victims(sequences, refusals) == ["q"]
    assert names_of_victims(sequences, {"r": RefusalReason.NO_BLOCKS}) == ["s"]
