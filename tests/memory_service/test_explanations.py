"""Why somebody got no blocks, or lost them: with the numbers that decided, and nothing of other tenants."""

from __future__ import annotations

import re
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_faces import NUM_ROWS, OneRouter, ask, ints, new_manager, registry_of
from pool_driver import TENANTS, PoolDriver
from state_folders import begin, open_store

from memory_service.decisions import DecisionKind
from memory_service.demand import Admit, Fork
from memory_service.explanations import Explanation, Explanations
from memory_service.inspection_servicer import InspectionServicer
from memory_service.record import ReleaseReason, StepApplied
from memory_service.recovery import new_books
from memory_service.snapshot import export_state, import_state
from memory_service.watching import Watching
from protos.memory.v1 import inspection_pb2 as pb
from quire.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

    from memory_service.block_manager import BlockManager
    from memory_service.demand import StepAnswer

ADMITTED, REFUSED, PREEMPTED, RELEASED, EVICTED = DecisionKind


class Explained(OneRouter):
    """A router whose refusals are explained, in a pool whose clock stands still until it is set."""

    def __init__(self, num_blocks: int, **bounds: int) -> None:
        self.now = 1000.0
        manager = new_manager(num_blocks, clock=lambda: self.now)
        self.explanations = Explanations(**bounds)
        self.explanations.listen_to(manager)
        super().__init__(manager)

    def apply(self, **changes: Any) -> StepAnswer:
        answer = super().apply(**changes)
        self.explanations.answered(self.key, answer)
        return answer

    def extend(self, row: int, start: int, count: int) -> StepAnswer:
        """Run tokens of a live row."""
        return self.apply(
            extend_rows=ints([row]), extend_starts=ints([start]), extend_num_tokens=ints([count])
        )

    def preempt(self, row: int) -> StepAnswer:
        """Give a row up for others."""
        return self.apply(releases=(row,), release_reasons=(ReleaseReason.PREEMPTED,))

    def told(self, sequence_id: str, tenant: str | None = None) -> list[Explanation]:
        """What is said of a sequence."""
        return self.explanations.of_sequence(sequence_id, tenant)

    def newest(self, sequence_id: str, tenant: str | None = None) -> Explanation:
        """The newest of it."""
        return self.told(sequence_id, tenant)[0]


def test_an_admission_says_how_much_was_there() -> None:
    """Two of three blocks hit; the last is always given."""
    router = Explained(20)
    router.cache([1] * 9)
    router.admit(0, [1] * 9, sequence_id="again")
    (found,) = router.told("again")
    assert (found.kind, found.revision, found.time) == (ADMITTED, router.manager.revision, 1000.0)
    assert found.reason == (
        "It came in with 9 tokens, 8 of them from the prefix cache: it shares 2 blocks and was given 1."
    )


def test_a_refusal_that_repeats_is_told_once_with_its_newest_numbers() -> None:
    """An answer that changes nothing counts too."""
    router = Explained(10)
    router.run(0, [1] * 20)
    for second in range(5):
        router.now += 1
        router.admit(1, list(range(24)), sequence_id="late")
        if second == 3:
            router.extend(0, 20, 4)
    (found,) = router.told("late")
    assert (found.kind, found.num_times, found.time) == (REFUSED, 5, 1005.0)
    assert (found.num_needed_blocks, found.num_available_blocks) == (6, 3)
    assert found.reason == "It needed 6 blocks while waiting, and 3 could be given."


def test_who_waits_behind_somebody_has_no_numbers_of_its_own() -> None:
    """One lacks blocks, the next keeps its place."""
    router = Explained(6)
    admits = tuple(Admit(row, 1, f"s{row}", "r", ints([row] * 12)) for row in range(3))
    router.apply(admits=admits, admit_token_budget=100)
    assert (router.newest("s1").num_needed_blocks, router.newest("s1").num_available_blocks) == (
        3,
        2,
    )
    found = router.newest("s2")
    assert (found.num_needed_blocks, found.num_available_blocks) == (None, None)
    assert found.reason == (
        "It stayed waiting: somebody before it lacks blocks, and nobody overtakes."
    )


def test_budget_prefix_and_quotas_are_told_apart() -> None:
    """Each refusal in words of its own."""
    router = Explained(40)
    prompt, other = ints([1] * 12), ints([2] * 12)
    admits = (Admit(0, 1, "first", "r", prompt), Admit(1, 1, "same", "r", prompt))
    router.apply(admits=admits, admit_token_budget=100)
    assert "a running sequence computes its next block just now" in router.newest("same").reason
    router.apply(admits=(Admit(1, 1, "broke", "r", other),), admit_token_budget=0)
    assert "used up the tokens of the step" in router.newest("broke").reason
    router.manager.sharing.set_quota("blue", None, 4)
    router.admit(1, [3] * 12, tenant="blue")
    names = ("over", "behind", "huge")
    sizes = (8, 8, 20)
    admits = tuple(
        Admit(2 + which, 1, name, "r", ints([9 + which] * size), tenant="blue")
        for which, (name, size) in enumerate(zip(names, sizes, strict=True))
    )
    router.apply(admits=admits[:2], admit_token_budget=100)
    router.apply(admits=admits[2:], admit_token_budget=100)
    assert router.newest("over").reason == (
        "It needed 2 blocks while waiting, and the hard quota of its tenant had room for 1."
    )
    assert "of its tenant before it lacks quota" in router.newest("behind").reason
    assert "had room for 1, is too small for it in any case" in router.newest("huge").reason


def full_pool(*tenants: str) -> Explained:
    """Rows 0 and 1 of these tenants fill a pool; in the last answer row 0 was refused two more blocks."""
    router = Explained(7)
    for row, tenant in enumerate(tenants):
        router.run(row, [row] * 12, tenant=tenant)
    router.extend(0, 12, 5)
    return router


def test_a_preemption_names_who_lacked_blocks() -> None:
    """The sequence that was refused in the step before, with its numbers."""
    router = full_pool("", "")
    refused = router.newest("s0")
    assert refused.reason == "It needed 2 blocks while running, and 0 could be given."
    router.preempt(1)
    found = router.newest("s1")
    assert (found.kind, found.cause_sequence_id) == (PREEMPTED, "s0")
    assert (found.num_needed_blocks, found.num_available_blocks) == (2, 0)
    assert found.reason == (
        "Sequence 's0' needed 2 blocks to go on, 0 could be given in the pool, and this one was "
        "the least urgent."
    )


def test_a_preemption_long_after_a_refusal_names_nobody() -> None:
    """Only the step before counts."""
    router = full_pool("", "")
    router.apply()
    router.preempt(1)
    found = router.newest("s1")
    assert (found.cause_sequence_id, found.num_needed_blocks) == ("", None)
    assert found.reason == "Its router gave its blocks up for more urgent sequences."


def test_a_preempted_sequence_of_another_tenant_does_not_learn_for_whom() -> None:
    """Neither the name nor the numbers; the operator does."""
    router = full_pool("red", "blue")
    router.preempt(1)
    found = router.newest("s1", "blue")
    assert (found.cause_sequence_id, found.num_needed_blocks, found.num_available_blocks) == (
        "",
        None,
        None,
    )
    assert found.reason == "Others needed more blocks than there were, and it was the least urgent."
    assert router.newest("s1").cause_sequence_id == "s0"
    assert router.told("s1", "red") == []


@pytest.mark.parametrize("reason", [found for found in ReleaseReason if found.value != 2])
def test_a_release_says_why_and_after_how_long(reason: ReleaseReason) -> None:
    """Each reason in words of its own; a session that ends is one."""
    router = Explained(20)
    router.run(0, [1] * 5)
    router.now += 12.25
    if reason is ReleaseReason.LAPSED:
        router.manager.close_session(router.key)
    else:
        router.apply(releases=(0,), release_reasons=(reason,))
    found = router.newest("s0")
    assert found.kind is RELEASED
    assert found.reason.endswith(", 12.2 s after it came in.")
    assert {
        ReleaseReason.UNSPECIFIED: "without saying why",
        ReleaseReason.FINISHED: "It finished",
        ReleaseReason.CANCELLED: "cancelled",
        ReleaseReason.FAILED: "could not be run",
        ReleaseReason.RESUMED: "resumed a lost stream",
        ReleaseReason.LAPSED: "session ended",
    }[reason] in found.reason


def test_a_fork_names_its_parent() -> None:
    """And the tokens that it shares."""
    router = Explained(20)
    router.run(0, [1] * 6)
    router.apply(forks=(Fork(0, 1, 1, "child", "r", 6),))
    assert router.newest("child").reason == (
        "It was forked from sequence 's0', whose first 6 tokens it shares."
    )


# Evictions


def test_an_eviction_says_why_this_block_and_for_whom() -> None:
    """The least recently used one, with how long it was idle."""
    router = Explained(6)
    lost = router.cache([1] * 8)[1]
    router.now += 300
    router.run(0, [2] * 16, sequence_id="taker")
    (found,) = router.explanations.of_block(lost, None)
    assert (found.kind, found.sequence_id, found.cause_sequence_id) == (EVICTED, "", "taker")
    assert found.reason == (
        "No block was free, and of the cached ones of the lowest priority this was used least "
        "recently: idle for 5 min, priority 0. It went to sequence 'taker'."
    )
    assert router.explanations.of_block(0, None) == []


def test_an_eviction_for_a_running_sequence_names_it() -> None:
    """Blocks that a sequence is given as it grows, beside those of an admission."""
    router = Explained(5)
    lost = router.cache([1] * 4)
    router.run(0, [2] * 12, sequence_id="grows")
    router.extend(0, 12, 4)
    (found,) = router.explanations.of_block(lost[0], None)
    assert found.cause_sequence_id == "grows"


def test_shares_are_given_as_the_cause() -> None:
    """A tenant over its share gives its own; others take from one that is over its share first."""
    router = Explained(9)
    own = router.cache([1] * 8, tenant="blue")
    router.manager.sharing.set_quota("blue", 1, None)
    router.run(0, [2] * 28, tenant="red", sequence_id="taker")
    (found,) = router.explanations.of_block(own[1], None)
    assert found.reason.startswith("No block was free, and tenant 'blue' holds more than its share")
    assert found.reason.endswith("It went to sequence 'taker' of tenant 'red'.")
    (hidden,) = router.explanations.of_block(own[1], "blue")
    assert (hidden.cause_sequence_id, "taker" in hidden.reason, "red" in hidden.reason) == (
        "",
        False,
        False,
    )
    assert router.explanations.of_block(own[1], "red") == []
    router.release(0)
    router.manager.sharing.set_quota("blue", None, 1)
    router.admit(0, [3] * 4, tenant="blue", sequence_id="own")
    (found,) = router.explanations.of_block(own[0], "blue")
    assert found.reason.startswith("tenant 'blue' needed a block beyond its share")
    assert found.cause_sequence_id == "own"


# What is remembered


def test_the_oldest_are_forgotten() -> None:
    """Bounded in sequences, in evictions, and in decisions about one."""
    router = Explained(6, max_sequences=3, max_evictions=5)
    for which in range(40):
        router.cache([which] * 8)
    assert router.told(f"s{NUM_ROWS - 1}") != []
    assert len(router.told(f"s{NUM_ROWS - 1}")) == 16
    assert sum(len(router.explanations.of_block(block, None)) for block in range(6)) == 5
    for name in "abcd":
        router.admit(0, [1], sequence_id=name)
        router.release(0)
    assert [len(router.told(name)) for name in "abcd"] == [0, 2, 2, 2]


def test_another_pool_begins_with_nothing() -> None:
    """Its block ids are others."""
    router = Explained(6)
    router.cache([1] * 8)
    router.explanations.listen_to(new_manager(6))
    assert router.told(f"s{NUM_ROWS - 1}") == []


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1 << 30))
def test_nothing_that_a_tenant_is_told_speaks_of_others(seed: int) -> None:
    """No name of another tenant or of its sequences in any answer; every sequence's end and start is told."""
    manager = new_manager(24, min_partial_tokens=2)
    explanations = Explanations()
    explanations.listen_to(manager)
    owners: dict[str, str] = {}

    def note(record: Any) -> None:
        if isinstance(record.change, StepApplied):
            owners.update((found.sequence_id, found.tenant) for found in record.change.admissions)
            rows = manager.table(record.change.session_key)
            owners.update(
                (found.sequence_id, rows[found.dst_row].tenant.name)
                for found in record.change.forks
            )

    manager.observers.append(note)
    driver = PoolDriver(manager, seed)
    for _ in range(150):
        driver.act()
    for tenant in TENANTS:
        told = [
            found for block_id in range(24) for found in explanations.of_block(block_id, tenant)
        ]
        for sequence_id, owner in owners.items():
            found = explanations.of_sequence(sequence_id, tenant)
            assert bool(found) == (owner == tenant)
            told += found
        for found in told:
            named = set(re.findall(r"'(.*?)'", found.reason)) | {found.cause_sequence_id}
            assert {owners.get(name, name) for name in named} <= {tenant, ""}, found.reason


def test_what_was_decided_since_the_last_snapshot_is_told_after_a_restart(tmp_path: Path) -> None:
    """The fold of the log tells it again; a sequence of before the restart is known by name when it ends later."""
    with closing(open_store(tmp_path)) as store:
        manager = begin(store)
        before = Explanations()
        before.listen_to(manager)
        router = OneRouter(manager)
        lost = router.cache([1] * 12)
        router.run(0, list(range(84)), sequence_id="taker")
        router.run(1, [1], sequence_id="lives")
    after = Explanations()
    with closing(open_store(tmp_path)) as store:
        found = store.recover(new_books(store.secret), after.listen_to)
        assert found is not None
    told = after.of_block(lost[-1], None)
    assert told == before.of_block(lost[-1], None)
    assert told[0].cause_sequence_id == "taker"
    found.manager.close_session(router.key)
    assert [each.kind for each in after.of_sequence("lives", None)] == [RELEASED, ADMITTED]


def test_books_from_a_snapshot_know_who_lives() -> None:
    """Listening may begin at any time."""
    manager = new_manager(20)
    OneRouter(manager).run(0, [1] * 5)
    copy = new_manager(20)
    import_state(copy, export_state(manager))
    explanations = Explanations()
    explanations.listen_to(copy)
    copy.close_session(1)
    assert [each.kind for each in explanations.of_sequence("s0", None)] == [RELEASED]


# As a call


def explained(manager: BlockManager, explanations: Explanations) -> InspectionServicer:
    registry: Any = registry_of(manager)
    return InspectionServicer(registry, None, explanations, Watching(registry, None))


def test_the_answer_carries_all_of_it() -> None:
    """In the words and fields of the contract, for one tenant or all."""
    router = full_pool("red", "blue")
    router.preempt(1)
    servicer = explained(router.manager, router.explanations)
    answer = ask(servicer.Explain, pb.ExplainRequest(sequence_id="s1"))
    assert answer.revision == str(router.manager.revision)
    newest = answer.explanations[0]
    assert (newest.kind, newest.num_times) == (pb.DECISION_KIND_PREEMPTED, "1")
    assert (newest.num_needed_blocks, newest.cause_sequence_id) == (2, "s0")
    assert newest.time.ToMicroseconds() == 1_000_000_000
    assert newest.revision == answer.revision
    hidden = ask(servicer.Explain, pb.ExplainRequest(sequence_id="s1"), "blue").explanations[0]
    assert (hidden.HasField("num_needed_blocks"), hidden.cause_sequence_id) == (False, "")
    assert not ask(servicer.Explain, pb.ExplainRequest(sequence_id="s1"), "red").explanations
    assert not ask(servicer.Explain, pb.ExplainRequest(block_id=-7)).explanations


@pytest.mark.parametrize(
    "request_", [pb.ExplainRequest(), pb.ExplainRequest(sequence_id="s", block_id=0)]
)
def test_exactly_one_thing_is_asked_about(request_: pb.ExplainRequest) -> None:
    """Nothing and both are refused."""
    router = Explained(6)
    servicer = explained(router.manager, router.explanations)
    with pytest.raises(InvalidRequest, match="exactly one"):
        ask(servicer.Explain, request_)
