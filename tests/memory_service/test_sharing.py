"""Tenants, quotas, retention, flushes, published prefixes, partial hits: exact states after single calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import pytest
from flushing import flush
from pool_machine import SESSION, SIZE, ints, make_manager

from memory_service import sharing
from memory_service.block_pool import EvictionCause
from memory_service.demand import Admit, Fork, RefusalReason, StepAnswer, StepDemand
from memory_service.integrity import check_integrity
from memory_service.sharing import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memory_service.block_manager import BlockManager


class Steps:
    """Whole sequences through one manager, a tenant each."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self._step = 0
        self._row = 0

    def admit(self, tokens: list[int], tenant: str = "", row: int = 0) -> StepAnswer:
        self._step += 1
        admit = Admit(row, 1, f"s{self._step}", "r", ints(tokens), tenant=tenant)
        demand = StepDemand(
            step=self._step,
            acknowledged_step=self._step - 1,
            admits=(admit,),
            admit_token_budget=99,
        )
        return self.manager.apply(SESSION, demand)

    def finish(self, tokens: list[int], row: int = 0) -> None:
        """Commit all of the row's tokens and release it."""
        self._step += 1
        computed = int(self.manager.table(SESSION).num_computed[row])
        demand = StepDemand(
            step=self._step,
            acknowledged_step=self._step - 1,
            commit_rows=ints([row]),
            commit_num_computed_tokens=ints([len(tokens)]),
            commit_token_ids=ints(tokens[computed // SIZE * SIZE : len(tokens) // SIZE * SIZE]),
            releases=(row,),
        )
        self.manager.apply(SESSION, demand)

    def run(self, tokens: list[int], tenant: str = "") -> int:
        """Admit and finish; the tokens that hit."""
        (admission,) = self.admit(tokens, tenant).admissions
        self.finish(tokens)
        return admission.num_cached_tokens


@pytest.fixture
def steps() -> Iterator[Steps]:
    manager = make_manager(min_partial_tokens=2)
    yield Steps(manager)
    assert check_integrity(manager) == []


PROMPT = list(range(9))


def test_a_tenant_hits_its_own_blocks_only(steps: Steps) -> None:
    """The same prompt of another tenant finds nothing, whole or in part; the probe says so before."""
    steps.run(PROMPT, "a")
    assert steps.manager.probe(ints(PROMPT), "b").num_tokens(SIZE) == 0
    assert steps.run(PROMPT, "b") == 0
    assert steps.manager.probe(ints(PROMPT), "a").num_tokens(SIZE) == 8
    assert steps.run(PROMPT, "a") == 8


def test_another_tenant_s_blocks_do_not_crowd_out_a_partial_hit(steps: Steps) -> None:
    """Blocks of others behind the same published prefix are not even looked at."""
    steps.manager.sharing.publish(ints(PROMPT[:4]))
    steps.run([*PROMPT[:4], 50, 51, 52, 53, 54], "a")
    for first in range(3):
        steps.run([*PROMPT[:4], 50, first, first, first, first], "b")
    assert steps.run([*PROMPT[:4], 50, 51, 52, 99, 99], "a") == 7


def test_a_partial_hit_is_a_copy(steps: Steps) -> None:
    """Three of four tokens match: the new block begins as a copy, its source is pinned until the step is acknowledged."""
    steps.run([1, 2, 3, 4, 5])
    answer = steps.admit([1, 2, 3, 9, 9, 9])
    (admission,) = answer.admissions
    source = steps.manager.probe(ints([1, 2, 3, 4, 5]), "").block_ids[0]
    assert admission.num_cached_tokens == 3
    assert answer.copies == [(source, int(admission.block_table[0]))]
    assert steps.manager.pool.pins[source] == 1
    steps.finish([1, 2, 3, 9, 9, 9])
    assert steps.manager.pool.pins[source] == 0


def test_a_copy_that_saves_too_little_is_not_made(steps: Steps) -> None:
    """One token is below the bound of two."""
    steps.run([1, 2, 3, 4, 5])
    assert steps.admit([1, 9, 9, 9, 9]).copies == []


def test_the_source_of_a_copy_is_not_evicted_for_it(steps: Steps) -> None:
    """In a pool that is full of cached blocks the copied one stays, though it is the oldest."""
    steps.run([1, 2, 3, 4, 5])
    for first in range(10, 22):
        steps.run([first] * 5)
    assert steps.manager.pool.num_free <= 1
    answer = steps.admit([1, 2, 3, 9, 9, 9])
    assert {source for source, _ in answer.copies}.isdisjoint(answer.admissions[0].block_table)


@pytest.mark.parametrize("hard", [None, 13])
def test_who_needs_every_block_does_without_a_copy(steps: Steps, hard: int | None) -> None:
    """The copy's source would be one block too many, of the pool as of a quota."""
    steps.manager.sharing.set_quota("a", None, hard)
    steps.run([1, 2, 3, 4, 5], "a")
    (admission,) = steps.admit([1, 2, *range(50, 50 + 13 * SIZE - 2)], "a").admissions
    assert (admission.num_cached_tokens, len(admission.block_table)) == (0, 13)


def test_a_hard_quota_is_never_exceeded(steps: Steps) -> None:
    """Blocks beyond it come only in exchange for the tenant's own cached ones, though others are free."""
    steps.manager.sharing.set_quota("a", None, 3)
    for first in range(4):
        steps.run([first] * 9, "a")
        assert steps.manager.pool.tenants["a"].num_blocks <= 3
    assert steps.manager.pool.num_free == 11


def test_who_waits_for_its_quota_is_overtaken_by_others_only(steps: Steps) -> None:
    """A demand over its tenant's quota is refused as such, and so is a later one of it; another tenant comes in."""
    steps.manager.sharing.set_quota("a", None, 3)
    steps.admit([7] * 8, "a", row=0)
    demands = ((1, "a", 8), (2, "a", 1), (3, "b", 8))
    admits = tuple(
        Admit(row, 1, f"x{row}", "r", ints([row] * count), tenant=tenant)
        for row, tenant, count in demands
    )
    answer = steps.manager.apply(SESSION, StepDemand(step=99, admits=admits, admit_token_budget=99))
    assert answer.refusals == [(1, RefusalReason.OVER_QUOTA), (2, RefusalReason.OVER_QUOTA)]
    assert [found.row for found in answer.admissions] == [3]
    assert (answer.shortages[0].num_needed_blocks, answer.shortages[0].num_available_blocks) == (
        2,
        1,
    )


@pytest.mark.parametrize(("num_tokens", "reason"), [(12, None), (13, "LARGER_THAN_QUOTA")])
def test_what_never_fits_a_quota_is_told(steps: Steps, num_tokens: int, reason: str | None) -> None:
    """Three blocks fit a quota of three, four never will."""
    steps.manager.sharing.set_quota("a", None, 3)
    answer = steps.admit([7] * num_tokens, "a")
    assert [found.name for _, found in answer.refusals] == ([reason] if reason else [])


def test_a_running_sequence_that_outgrows_its_quota_is_told(steps: Steps) -> None:
    """Nobody else of the tenant could make room."""
    steps.manager.sharing.set_quota("a", None, 2)
    steps.admit([7] * 8, "a")
    demand = StepDemand(
        step=50,
        acknowledged_step=1,
        commit_rows=ints([0]),
        commit_num_computed_tokens=ints([8]),
        commit_token_ids=ints([7] * 8),
        extend_rows=ints([0]),
        extend_starts=ints([8]),
        extend_num_tokens=ints([1]),
    )
    answer = steps.manager.apply(SESSION, demand)
    assert answer.refusals == [(0, RefusalReason.LARGER_THAN_QUOTA)]


def test_a_tenant_over_its_share_evicts_its_own_first(steps: Steps) -> None:
    """Another tenant's older block outlives the newer ones of the tenant that is over its soft quota."""
    steps.run([1] * 5, "b")
    steps.manager.sharing.set_quota("a", 2, None)
    for first in range(10, 30):
        steps.run([first] * 5, "a")
    assert steps.manager.probe(ints([1] * 5), "b").num_tokens(SIZE) == 4
    steps.admit([99] * 5, "a")
    (eviction,) = steps.manager.pool.evictions[:1]
    assert (eviction.tenant, eviction.cause) == ("a", EvictionCause.OWN_SHARE)


def test_who_is_over_its_share_gives_to_others_first(steps: Steps) -> None:
    """A tenant without a quota takes from the one over its share, not from a third one whose block is older."""
    steps.run([1] * 5, "b")
    for first in range(10, 30):
        steps.run([first] * 5, "a")
    steps.run([1] * 5, "b")
    steps.manager.sharing.set_quota("a", 2, None)
    steps.admit([99] * 9, "c")
    assert {found.cause for found in steps.manager.pool.evictions} == {EvictionCause.OTHERS_SHARE}
    assert {found.tenant for found in steps.manager.pool.evictions} == {"a"}


def test_retained_blocks_are_evicted_last_and_never_wedge(steps: Steps) -> None:
    """A flood leaves a retained prefix; a sequence that needs the whole pool still gets it."""
    steps.run(PROMPT)
    outcome = steps.manager.sharing.retain_prefix("", ints(PROMPT), 3, None)
    assert (outcome.verdict, outcome.num_blocks) == (Verdict.ACCEPTED, 2)
    for first in range(10, 40):
        steps.run([first] * 5)
    assert steps.manager.probe(ints(PROMPT), "").num_tokens(SIZE) == 8
    whole = list(range(100, 100 + 13 * SIZE))
    assert steps.admit(whole).admissions
    assert steps.manager.probe(ints(PROMPT), "").num_tokens(SIZE) == 0


def test_a_retention_ends_with_its_time(steps: Steps) -> None:
    """Before, its blocks are kept; after, they go in their turn."""
    steps.run(PROMPT)
    steps.manager.sharing.retain_prefix("", ints(PROMPT), 3, 1_000.0)
    assert steps.manager.sharing.expire(999.0) == 0
    assert steps.manager.pool.num_retained == 2
    assert steps.manager.sharing.expire(1_000.0) == 1
    assert steps.manager.pool.num_retained == 0
    for first in range(10, 30):
        steps.run([first] * 5)
    assert steps.manager.probe(ints(PROMPT), "").num_tokens(SIZE) == 0


def test_at_most_half_is_retained(steps: Steps) -> None:
    """Of the pool, and of a tenant's hard quota; the rest of the wish is cut, and said to be."""
    tokens = list(range(9 * SIZE + 1))
    steps.run(tokens)
    outcome = steps.manager.sharing.retain_prefix("", ints(tokens), 1, None)
    assert (outcome.verdict, outcome.num_blocks) == (Verdict.CLIPPED, 7)
    steps.manager.sharing.set_quota("a", None, 4)
    steps.run(PROMPT, "a")
    rejected = steps.manager.sharing.retain_prefix("a", ints(PROMPT), 1, None)
    assert rejected.verdict is Verdict.REJECTED


def test_a_retained_sequence_keeps_what_it_seals_later(steps: Steps) -> None:
    """Nothing is sealed when it is retained; both of its blocks are in the end."""
    steps.admit(PROMPT)
    (_, sequence) = next(steps.manager.table(SESSION).items())
    outcome = steps.manager.sharing.retain_sequence("", sequence.sequence_id, 2, None)
    assert (outcome.verdict, outcome.num_blocks) == (Verdict.ACCEPTED, 0)
    steps.finish(PROMPT)
    assert steps.manager.pool.num_retained == 2
    foreign = steps.manager.sharing.retain_sequence("b", sequence.sequence_id, 2, None)
    assert foreign.verdict is Verdict.REJECTED


def test_a_flush_frees_what_is_cached_and_hides_what_is_used(steps: Steps) -> None:
    """Of the tenant alone; a second flush finds nothing."""
    steps.run(PROMPT, "a")
    steps.run(PROMPT, "b")
    steps.admit(PROMPT, "a")
    outcome = flush(steps.manager, "a", ints([]))
    assert (outcome.num_freed, outcome.num_used) == (0, 2)
    assert steps.manager.probe(ints(PROMPT), "a").block_ids == []
    assert steps.manager.probe(ints(PROMPT), "b").num_tokens(SIZE) == 8
    steps.finish(PROMPT)
    assert flush(steps.manager, "a", ints([])).num_freed == 0
    assert steps.manager.pool.num_cached == 2


def test_a_flush_of_a_prefix_leaves_the_rest(steps: Steps) -> None:
    """What begins with other tokens still hits."""
    steps.run([1] * 9)
    steps.run([2] * 9)
    assert flush(steps.manager, "", ints([1] * 4)).num_freed == 2
    assert steps.manager.probe(ints([1] * 9), "").block_ids == []
    assert steps.manager.probe(ints([2] * 9), "").num_tokens(SIZE) == 8


def test_retaining_what_all_share_keeps_within_the_quota(steps: Steps) -> None:
    """Who retains a published block pays for it: not more of them than its hard quota leaves room for."""
    manager = steps.manager
    manager.sharing.publish(ints(list(range(2 * SIZE))))
    steps.run([*range(2 * SIZE), 90], "b")
    manager.sharing.set_quota("a", None, 2)
    steps.admit([*range(2 * SIZE), 70], "a")
    held = manager.pool.tenants["a"]
    assert (held.num_blocks, held.hard_blocks) == (1, 2)
    outcome = manager.sharing.retain_prefix("a", ints(list(range(2 * SIZE))), 5, None)
    assert outcome.verdict is Verdict.CLIPPED
    assert "hard quota" in outcome.reason
    assert held.num_blocks == 2
    assert check_integrity(manager) == []


def test_a_published_prefix_is_shared_by_all(steps: Steps) -> None:
    """Up to its end; what follows is each tenant's own. Withdrawn, it is shared no more."""
    outcome = steps.manager.sharing.publish(ints(PROMPT[:5]))
    assert (outcome.verdict, outcome.num_blocks) == (Verdict.CLIPPED, 4)
    assert steps.run(PROMPT, "a") == 0
    assert steps.run(PROMPT, "b") == 4
    assert steps.run(PROMPT, "b") == 8
    assert steps.manager.sharing.withdraw(outcome.made_id).verdict is Verdict.ACCEPTED
    assert steps.run(PROMPT, "c") == 0


def test_a_tenant_of_whom_nothing_is_left_is_forgotten(steps: Steps) -> None:
    """Names that come with requests do not pile up."""
    for which in range(30):
        steps.run([which] * 5, f"tenant-{which}")
    assert len(steps.manager.pool.tenants) <= steps.manager.pool.num_cached


def test_what_all_share_counts_against_nobody(steps: Steps) -> None:
    """Whoever computes a published prefix first keeps its whole quota, while others hold those blocks too."""
    steps.manager.sharing.set_quota("a", None, 3)
    steps.manager.sharing.publish(ints(PROMPT[:8]))
    steps.run(PROMPT, "a")
    steps.admit(PROMPT, "b", row=1)
    assert steps.admit([7] * 12, "a").admissions
    assert steps.manager.pool.tenants["*"].num_blocks == 2


def test_a_flush_finds_all_that_hangs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it looks at few blocks at a time, nothing behind the prefix hits when it says that it is done."""
    monkeypatch.setattr(sharing, "FLUSH_CHUNK", 3)
    steps = Steps(make_manager(60, min_partial_tokens=2))
    tails = [[first] * 9 for first in range(10, 18)]
    for tail in tails:
        steps.run([1, 2, 3, 4, *tail])
    flush(steps.manager, "", ints([1, 2, 3, 4]))
    steps.run([1, 2, 3, 4, 5])
    for tail in tails:
        assert steps.manager.probe(ints([1, 2, 3, 4, *tail]), "").num_tokens(SIZE) == 4


def test_retentions_that_come_and_go_leave_nothing(steps: Steps) -> None:
    """Entries of homes that are gone are forgotten, though their priority never comes up."""
    steps.run(PROMPT)
    for _ in range(500):
        outcome = steps.manager.sharing.retain_prefix("", ints(PROMPT), 7, None)
        steps.manager.sharing.release("", outcome.made_id)
    assert sum(map(len, steps.manager.pool.queue._heaps)) < 100


def test_one_tenant_does_not_take_all_retentions(steps: Steps) -> None:
    """Its 65th is refused, another tenant's first is not."""
    steps.run(PROMPT, "a")
    steps.run(PROMPT, "b")
    wishes = [steps.manager.sharing.retain_prefix("a", ints(PROMPT), 1, None) for _ in range(65)]
    assert [found.verdict for found in wishes].count(Verdict.REJECTED) == 1
    assert steps.manager.sharing.retain_prefix("b", ints(PROMPT), 1, None).made_id


@pytest.mark.parametrize("num_tokens", [2, 4])
def test_a_child_that_writes_into_a_sealed_block_gets_a_copy(num_tokens: int) -> None:
    """It was forked within a block that its parent sealed before it went."""
    manager = make_manager()
    steps = Steps(manager)
    steps.admit([1, 2, 3, 4, 5])
    fork = Fork(0, 1, 1, "child", "r", num_tokens)
    commit = {
        "commit_rows": ints([0]),
        "commit_num_computed_tokens": ints([5]),
        "commit_token_ids": ints([1, 2, 3, 4]),
    }
    manager.apply(SESSION, StepDemand(step=5, forks=(fork,), **commit))
    extend = {
        "extend_rows": ints([1]),
        "extend_starts": ints([num_tokens]),
        "extend_num_tokens": ints([1]),
    }
    answer = manager.apply(SESSION, StepDemand(step=6, releases=(0,), **extend))
    assert len(answer.copies) == (num_tokens < SIZE)
    assert check_integrity(manager) == []


def test_a_change_that_fails_half_way_ends_the_books(steps: Steps) -> None:
    """Nobody goes on from a state that no record tells of."""
    broken: list[Exception] = []

    def end(error: Exception) -> NoReturn:
        broken.append(error)
        raise SystemExit

    steps.manager.on_broken = end
    steps.manager.on_record = lambda _: int("no number")
    with pytest.raises(SystemExit):
        steps.admit(PROMPT)
    assert isinstance(broken[0], ValueError)
    steps.manager.on_record = lambda _: None
