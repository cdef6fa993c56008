"""What inspection shows is what the books hold, page by page, and nothing of other tenants."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import pool_driver
import pytest
from examples import examples
from flushing import flush
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_faces import SIZE, OneRouter, ask, inspection_of, ints, new_manager, registry_of
from pool_driver import TENANTS, PoolDriver

from memory_service.demand import Admit, RefusalReason, StepDemand
from memory_service.integrity import check_integrity
from memory_service.paging import encode_page_token
from memory_service.snapshot import export_state
from protos.memory.v1 import inspection_pb2 as pb
from quire.errors import BlockNotFound, InvalidRequest, SequenceNotFound

if TYPE_CHECKING:
    from memory_service.block_manager import BlockManager
    from memory_service.inspection_servicer import InspectionServicer

SEEDS = st.integers(0, 1 << 30)
STATES = ("FREE", "CACHED", "USED", "NULL")


def servicer_of(manager: BlockManager) -> InspectionServicer:
    return inspection_of(registry_of(manager))


def driven(seed: int, num_acts: int = 60, num_blocks: int = 30, **options: Any) -> PoolDriver:
    """A pool after many random steps and wishes of several tenants."""
    manager = new_manager(num_blocks, min_partial_tokens=2, **options)
    driver = PoolDriver(manager, seed)
    for _ in range(num_acts):
        driver.act()
    return driver


def tables_of(manager: BlockManager, tenant: str | None) -> list[list[int]]:
    """Block tables, those of a tenant."""
    return [
        books.table.block_table(row).tolist()
        for _, books in manager.sessions
        for row, found in books.table.items()
        if tenant in {None, found.tenant.name}
    ]


def all_pages(method: Any, request: Any, field: str, *tenants: str) -> list[Any]:
    """Everything that a paged call lists."""
    found = []
    while True:
        page = ask(method, request, *tenants)
        found += getattr(page, field)
        request.page_token = page.next_page_token
        if not request.page_token:
            return found
        assert len(getattr(page, field)) == request.page_size


def state_of(manager: BlockManager, block_id: int) -> str:
    """The state of a block by the lists of the pool."""
    pool = manager.pool
    if block_id == 0:
        return "NULL"
    if block_id in set(pool.free_blocks()):
        return "FREE"
    return "CACHED" if block_id in set(pool.cached_blocks()) else "USED"


# The pool


@settings(deadline=None, max_examples=examples(20))
@given(SEEDS, st.sampled_from([None, *TENANTS]))
def test_the_pool_is_counted_as_its_lists_and_tables_are(seed: int, tenant: str | None) -> None:
    """Blocks by state over the whole pool; sequences, slots, shared and retained blocks those of the tenant."""
    manager = driven(seed).manager
    pool = ask(
        servicer_of(manager).GetPool, pb.GetPoolRequest(), *([] if tenant is None else [tenant])
    )
    states = [state_of(manager, block_id) for block_id in range(30)]
    assert (pool.num_free_blocks, pool.num_cached_blocks, pool.num_used_blocks) == tuple(
        states.count(state) for state in ("FREE", "CACHED", "USED")
    )
    assert 1 + pool.num_free_blocks + pool.num_cached_blocks + pool.num_used_blocks == 30
    tables = tables_of(manager, tenant)
    assert pool.num_sequences == len(tables)
    own = range(30) if tenant is None else own_blocks(manager, tenant)
    assert pool.num_shared_blocks == sum(manager.pool.ref_counts[found] > 1 for found in own)
    num_slots = SIZE * sum(map(len, tables))
    told = [int(getattr(pool, f"num_{kind}_slots")) for kind in ("token", "reserved", "unused")]
    assert sum(told) == num_slots
    assert min(told) >= 0
    retained = [found for found in own if manager.pool.homes.get(manager.pool.home_ids[found])]
    assert pool.num_retained_blocks == sum(
        manager.pool.homes[manager.pool.home_ids[found]].priority > 0 for found in retained
    )


def own_blocks(manager: BlockManager, tenant: str) -> list[int]:
    """Blocks that count against a tenant, by their homes."""
    homes = manager.pool.homes
    return [
        block_id
        for block_id, home_id in enumerate(manager.pool.home_ids.tolist())
        if home_id and homes[home_id].tenant.name == tenant
    ]


def test_the_waste_is_told_in_slots() -> None:
    """Nine tokens in three blocks of four leave three slots unused; what a prompt runs just now is reserved."""
    manager = new_manager(20)
    router = OneRouter(manager)
    router.run(0, list(range(9)))
    router.admit(1, [7] * 6)
    pool = ask(servicer_of(manager).GetPool, pb.GetPoolRequest())
    assert (pool.num_token_slots, pool.num_reserved_slots, pool.num_unused_slots) == ("9", "6", "5")
    assert (pool.num_sessions, pool.num_prefix_query_tokens, pool.hit_rate) == (1, "15", 0.0)


def test_a_tenant_is_not_told_what_others_look_up() -> None:
    """Counts of hits are of all tenants together: an answer to one of them leaves them out."""
    manager = new_manager(20)
    router = OneRouter(manager)
    router.cache([1] * 8, tenant="red")
    router.run(0, [1] * 8, tenant="red")
    everybody = ask(servicer_of(manager).GetPool, pb.GetPoolRequest())
    assert (everybody.num_prefix_hit_tokens, everybody.hit_rate) == ("4", 0.25)
    blue = ask(servicer_of(manager).GetPool, pb.GetPoolRequest(), "blue")
    assert (blue.num_prefix_hit_tokens, blue.num_prefix_query_tokens, blue.hit_rate) == ("", "", 0)
    assert (blue.num_sequences, blue.num_sessions, blue.num_token_slots) == (0, 0, "0")


def test_an_epoch_is_that_of_the_pool_without_a_state_folder() -> None:
    """No pool outlives a service without one, so its id tells revisions apart; nothing is durable or logged."""
    pool = ask(servicer_of(new_manager(8)).GetPool, pb.GetPoolRequest())
    assert (pool.epoch, pool.pool_id, pool.durable, pool.log_mib) == ("pool-1", "pool-1", False, 0)


# Sequences


@settings(deadline=None, max_examples=examples(20))
@given(SEEDS, st.integers(1, 5), st.sampled_from([None, *TENANTS]))
def test_pages_of_sequences_show_each_once(seed: int, page_size: int, tenant: str | None) -> None:
    """Ids may repeat between sessions: the pages hold every live sequence once, in order, those of the tenant."""
    manager = driven(seed).manager
    for key in (901, 902):
        OneRouter(manager, f"same-{key}", key).admit(0, [1], sequence_id="same", tenant="blue")
    tenants = [] if tenant is None else [tenant]
    request = pb.ListSequencesRequest(page_size=page_size)
    found = all_pages(servicer_of(manager).ListSequences, request, "sequences", *tenants)
    keys = [(each.sequence_id, each.session_id, each.row) for each in found]
    expected = sorted(
        (known.sequence_id, books.session_id, row)
        for _, books in manager.sessions
        for row, known in books.table.items()
        if tenant in {None, known.tenant.name}
    )
    assert keys == expected


def test_what_lives_throughout_is_listed_while_others_come_and_go() -> None:
    """A page ends at a key, not at a number: a sequence that ended between two pages hides no other."""
    manager = new_manager(40)
    router = OneRouter(manager)
    for row in range(6):
        router.run(row, [row] * 5)
    servicer = servicer_of(manager)
    first = ask(servicer.ListSequences, pb.ListSequencesRequest(page_size=3))
    router.release(0, 2)
    request = pb.ListSequencesRequest(page_size=3, page_token=first.next_page_token)
    second = ask(servicer.ListSequences, request)
    assert [found.sequence_id for found in second.sequences] == ["s3", "s4", "s5"]
    assert second.next_page_token == ""


def test_sequences_are_filtered_by_request_and_session() -> None:
    """Both filters must hold; age counts from admission in seconds of the clock."""
    clock = iter(range(1000, 9000, 1)).__next__
    manager = new_manager(40, clock=lambda: float(clock()))
    first, second = OneRouter(manager, "one", 1), OneRouter(manager, "two", 2)
    for router in (first, second):
        router.run(0, [1])
        router.run(1, [2])
    request = pb.ListSequencesRequest(request_id="r1", session_id="two")
    (found,) = ask(servicer_of(manager).ListSequences, request).sequences
    assert (found.session_id, found.request_id, found.row, found.tenant) == ("two", "r1", 1, "")
    assert found.age_seconds == 2.0
    assert found.num_computed_tokens == found.num_blocks == 1


def test_a_sequence_is_shown_with_its_table() -> None:
    """Keys only of blocks that can be hit; of two sessions with the same id the one admitted last."""
    manager = new_manager(40)
    older, newer = OneRouter(manager, "older", 1), OneRouter(manager, "newer", 2)
    table = older.run(0, list(range(10)), tenant="red", sequence_id="twin")
    servicer, request = servicer_of(manager), pb.GetSequenceRequest(sequence_id="twin")
    shown = ask(servicer.GetSequence, request).block_table
    assert [entry.block_id for entry in shown] == table
    assert [len(entry.block_hash) for entry in shown] == [32, 32, 0]
    assert [entry.sealed for entry in shown] == [True, True, False]
    flush(manager, "red", ints([]))
    shown = ask(servicer.GetSequence, request).block_table
    assert [entry.block_hash for entry in shown] == ["", "", ""]
    time.sleep(0.01)
    newer.run(0, [5], tenant="blue", sequence_id="twin")
    assert ask(servicer.GetSequence, request).sequence.session_id == "newer"
    assert ask(servicer.GetSequence, request, "red").sequence.session_id == "older"
    with pytest.raises(SequenceNotFound, match="twin"):
        ask(servicer.GetSequence, request, "green")


# Blocks

FILTERS = st.fixed_dictionaries(
    {
        "state": st.sampled_from([0, 0, 1, 2, 3, 4]),
        "min_ref_count": st.sampled_from([0, 0, 1, 2]),
        "block_hash_prefix": st.sampled_from(["", "", "a", "7", "3F"]),
        "sequence_id": st.sampled_from(["", "", "s3", "s9", "nobody"]),
        "retained": st.sampled_from([False, False, True]),
        "min_idle_seconds": st.sampled_from([0, 0, 20, 1e6]),
    }
)


@settings(deadline=None, max_examples=examples(20))
@given(SEEDS, FILTERS, st.integers(1, 7), st.sampled_from([None, *TENANTS]))
def test_blocks_are_listed_by_all_filters(
    seed: int, filters: dict[str, Any], page_size: int, tenant: str | None
) -> None:
    """Every page together are the blocks that pass each filter by itself; `num_matches` counts them."""
    ticks = iter(range(1, 1 << 30))
    manager = driven(seed, clock=lambda: float(next(ticks))).manager
    tenants = [] if tenant is None else [tenant]
    servicer, now = servicer_of(manager), next(ticks)
    manager.clock = lambda: float(now)
    request = pb.ListBlocksRequest(page_size=page_size, **filters)
    first = ask(servicer.ListBlocks, request, *tenants)
    found = all_pages(servicer.ListBlocks, request, "blocks", *tenants)
    expected = [
        block_id for block_id in range(30) if passes(manager, block_id, filters, tenant, now)
    ]
    assert [block.block_id for block in found] == expected
    assert first.num_matches == len(expected)


def passes(
    manager: BlockManager, block_id: int, filters: dict[str, Any], tenant: str | None, now: float
) -> bool:
    """The filters, one block at a time."""
    pool, home = manager.pool, manager.pool.home_of(block_id)
    key = (pool.index.key_of(block_id) or b"") if pool.index.is_indexed(block_id) else b""
    named = [
        books.table.block_table(row).tolist()
        for _, books in manager.sessions
        for row, known in books.table.items()
        if known.sequence_id == filters["sequence_id"] and tenant in {None, known.tenant.name}
    ]
    last_used = pool.last_used[block_id]
    return (
        (tenant is None or (home is not None and home.tenant.name == tenant))
        and filters["state"] in {0, 1 + STATES.index(state_of(manager, block_id))}
        and int(pool.ref_counts[block_id]) >= filters["min_ref_count"]
        and (
            not filters["block_hash_prefix"]
            or key.hex().startswith(filters["block_hash_prefix"].lower())
        )
        and (not filters["sequence_id"] or any(block_id in table for table in named))
        and (not filters["retained"] or (home is not None and home.priority > 0))
        and (
            not filters["min_idle_seconds"]
            or (last_used > 0 and now - last_used >= filters["min_idle_seconds"])
        )
    )


def test_a_whole_key_finds_its_block() -> None:
    """All 32 digits are a prefix too, in either case; an odd number of digits cuts a byte in half."""
    manager = new_manager(20)
    table = OneRouter(manager).run(0, list(range(12)))
    servicer = servicer_of(manager)
    for block_id in table:
        key = (manager.pool.index.key_of(block_id) or b"").hex()
        for prefix in (key, key.upper(), key[:31]):
            (found,) = ask(
                servicer.ListBlocks, pb.ListBlocksRequest(block_hash_prefix=prefix)
            ).blocks
            assert (found.block_id, found.block_hash) == (block_id, key)


@settings(deadline=None, max_examples=examples(20))
@given(SEEDS, st.sampled_from([None, *TENANTS]))
def test_a_block_names_all_who_hold_it(seed: int, tenant: str | None) -> None:
    """Holders are the table entries that name it; without a tenant there are as many as its reference count."""
    manager = driven(seed).manager
    tenants, servicer = [] if tenant is None else [tenant], servicer_of(manager)
    for block_id in range(30) if tenant is None else own_blocks(manager, tenant):
        answer = ask(servicer.GetBlock, pb.GetBlockRequest(block_id=block_id), *tenants)
        expected = sorted(
            (known.sequence_id, known.request_id, books.session_id, index)
            for _, books in manager.sessions
            for row, known in books.table.items()
            for index, held in enumerate(books.table.block_table(row).tolist())
            if held == block_id and tenant in {None, known.tenant.name}
        )
        holders = sorted(
            (found.sequence_id, found.request_id, found.session_id, found.index)
            for found in answer.holders
        )
        assert holders == expected
        assert tenant is not None or len(holders) == answer.block.ref_count


def test_holders_are_found_among_many_rows() -> None:
    """Rows are looked at some at a time: a block that the shortest and the longest of hundreds hold has both."""
    manager = new_manager(2000)
    manager.open_session(1, 300, "many", 1)
    step = 0
    shared = list(range(SIZE))
    for row in range(300):
        step += 1
        tokens = shared + [row] * (row % 19 + 1)
        admit = Admit(row, 1, f"s{row}", "r", ints(tokens))
        manager.apply(1, StepDemand(step, step - 1, admits=(admit,), admit_token_budget=1 << 20))
        if row == 0:
            step += 1
            computed = {
                "commit_rows": ints([0]),
                "commit_num_computed_tokens": ints([len(tokens)]),
                "commit_token_ids": ints(tokens[: len(tokens) // SIZE * SIZE]),
            }
            manager.apply(1, StepDemand(step, step - 1, **computed))
    first = int(manager.table(1).block_table(0)[0])
    answer = ask(servicer_of(manager).GetBlock, pb.GetBlockRequest(block_id=first))
    assert answer.block.ref_count == len(answer.holders) == 300
    assert {found.index for found in answer.holders} == {0}
    assert {found.sequence_id for found in answer.holders} == {f"s{row}" for row in range(300)}


def test_a_block_that_is_not_there_is_not_found() -> None:
    """Nor is one of another tenant, or a free one when a tenant asks; the error is the same."""
    manager = new_manager(20)
    (red,) = OneRouter(manager).cache([1] * 4, tenant="red")
    servicer = servicer_of(manager)
    for block_id, tenants in ((-1, ()), (20, ()), (red, ("blue",)), (0, ("red",)), (19, ("red",))):
        with pytest.raises(BlockNotFound, match=f"there is no block {block_id};"):
            ask(servicer.GetBlock, pb.GetBlockRequest(block_id=block_id), *tenants)
    found = ask(servicer.GetBlock, pb.GetBlockRequest(block_id=red), "red").block
    assert (found.tenant, pb.BlockState.Name(found.state)) == ("red", "BLOCK_STATE_CACHED")


def test_a_block_that_was_never_given_out_is_not_idle() -> None:
    """Idle seconds count from the last use: 0 where there was none, and no filter by idleness finds it."""
    manager = new_manager(20, clock=lambda: 1e9)
    (used,) = OneRouter(manager).cache([1] * 4)
    manager.clock = lambda: 1e9 + 60
    servicer = servicer_of(manager)
    blocks = ask(servicer.ListBlocks, pb.ListBlocksRequest()).blocks
    assert {block.block_id: block.idle_seconds for block in blocks if block.idle_seconds} == {
        used: 60
    }
    (found,) = ask(servicer.ListBlocks, pb.ListBlocksRequest(min_idle_seconds=60)).blocks
    assert found.block_id == used


# Tenants and retentions


def test_tenants_are_shown_with_their_shares() -> None:
    """By name; absent quotas stay absent; one tenant sees itself alone."""
    manager = new_manager(40)
    router = OneRouter(manager)
    router.cache([1] * 8, tenant="red")
    router.run(0, [2] * 8, tenant="blue")
    manager.sharing.set_quota("green", None, 5)
    manager.sharing.set_quota("red", 3, 9)
    servicer = servicer_of(manager)
    found = ask(servicer.ListTenants, pb.ListTenantsRequest()).tenants
    assert [
        (each.tenant, each.num_blocks, each.num_cached_blocks, each.num_sequences) for each in found
    ] == [("blue", 2, 0, 1), ("green", 0, 0, 0), ("red", 2, 2, 0)]
    quotas = [(each.HasField("soft_quota_blocks"), each.hard_quota_blocks) for each in found]
    assert quotas == [(False, 0), (False, 5), (True, 9)]
    (alone,) = ask(servicer.ListTenants, pb.ListTenantsRequest(), "red").tenants
    assert alone == found[2]
    assert not ask(servicer.ListTenants, pb.ListTenantsRequest(), "nobody").tenants


def test_retentions_and_published_prefixes_are_listed() -> None:
    """Retentions with what they protect now, one tenant's; published prefixes, which are everybody's."""
    manager = new_manager(40)
    router = OneRouter(manager)
    router.cache([1] * 8, tenant="red")
    router.cache([2] * 8, tenant="blue")
    manager.sharing.retain_prefix("red", ints([1] * 8), 5, 2e9 + 0.25)
    manager.sharing.retain_prefix("blue", ints([2] * 4), 1, None)
    manager.sharing.publish(ints([3] * 12))
    router.cache([3] * 9, tenant="red")
    servicer = servicer_of(manager)
    answer = ask(servicer.ListRetentions, pb.ListRetentionsRequest())
    assert [
        (each.retention_id, each.tenant, each.priority, each.num_blocks)
        for each in answer.retentions
    ] == [("r-1", "red", 5, 2), ("r-2", "blue", 1, 1)]
    assert answer.retentions[0].expire_time.ToMilliseconds() == 2_000_000_000_250
    assert not answer.retentions[1].HasField("expire_time")
    (prefix,) = answer.published_prefixes
    assert (prefix.prefix_id, prefix.num_tokens, prefix.num_present_blocks) == ("p-1", 12, 2)
    blue = ask(servicer.ListRetentions, pb.ListRetentionsRequest(), "blue")
    assert [each.retention_id for each in blue.retentions] == ["r-2"]
    assert list(blue.published_prefixes) == [prefix]
    retained = ask(servicer.ListBlocks, pb.ListBlocksRequest(retained=True)).blocks
    assert [(each.retention_id, each.priority) for each in retained] == [("r-1", 5)] * 2 + [
        ("r-2", 1)
    ]


# Probe


@settings(deadline=None, max_examples=examples(40))
@given(SEEDS, st.lists(st.integers(0, 1), min_size=1, max_size=18), st.sampled_from(TENANTS))
def test_a_probe_says_what_an_admission_gets(seed: int, tokens: list[int], tenant: str) -> None:
    """Right after the probe: the same tokens are found, as many blocks are needed, or the same prefix is waited for."""
    driver = driven(seed, num_blocks=400)
    manager = driver.manager
    before = export_state(manager)
    request = pb.ProbePrefixRequest(token_ids=tokens)
    probe = ask(servicer_of(manager).ProbePrefix, request, tenant)
    assert export_state(manager) == before
    manager.sharing.set_quota(tenant, None, None)
    answer = OneRouter(manager, "new", 900).admit(0, tokens, tenant=tenant)
    if probe.num_in_progress_tokens:
        assert answer.refusals == [(0, RefusalReason.PREFIX_IN_PROGRESS)]
        return
    (admission,) = answer.admissions
    assert admission.num_cached_tokens == probe.num_cached_tokens
    assert len(admission.block_table) - probe.num_shared_tokens // SIZE == probe.num_needed_blocks
    copied = probe.num_cached_tokens - probe.num_shared_tokens
    assert len(answer.copies) == (copied > 0)


def test_a_probe_counts_what_is_being_computed() -> None:
    """Blocks behind the hit, in order, as far as a running sequence of the same tenant will fill them."""
    manager = new_manager(40)
    router = OneRouter(manager)
    tokens = list(range(16))
    router.cache(tokens[:4], tenant="red")
    router.admit(0, tokens[:13], tenant="red")
    servicer, request = servicer_of(manager), pb.ProbePrefixRequest(token_ids=tokens)
    probe = ask(servicer.ProbePrefix, request, "red")
    told = (probe.num_cached_tokens, probe.num_in_progress_tokens, probe.num_needed_blocks)
    assert told == (4, 8, 3)
    for tenants in ((), ("blue",)):
        probe = ask(servicer.ProbePrefix, request, *tenants)
        told = (probe.num_cached_tokens, probe.num_in_progress_tokens, probe.num_needed_blocks)
        assert told == (0, 0, 4)


def test_a_copy_never_brings_a_whole_block() -> None:
    """What was sealed before its prefix was published has other keys: a copy of it lacks a token, and is sealed anew."""
    manager = new_manager(40, min_partial_tokens=1)
    router = OneRouter(manager)
    router.cache([1] * 4, tenant="red")
    manager.sharing.publish(ints([1] * 4))
    request = pb.ProbePrefixRequest(token_ids=[1] * 9)
    probe = ask(servicer_of(manager).ProbePrefix, request, "red")
    assert (probe.num_cached_tokens, probe.num_shared_tokens) == (3, 0)
    router.run(0, [1] * 9, tenant="red")
    assert check_integrity(manager) == []
    assert ask(servicer_of(manager).ProbePrefix, request, "blue").num_shared_tokens == 4


# Isolation


class OneTenantDriver(PoolDriver):
    """Drives what one tenant does, and publishes nothing."""

    def __init__(self, manager: BlockManager, seed: int, tenant: str, first_key: int) -> None:
        super().__init__(manager, seed)
        self._last_key = self._last_generation = first_key
        self._tenant = tenant

    def act(self) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(pool_driver, "TENANTS", (self._tenant,))
            super().act()

    def _publish(self) -> None:
        """Nothing is shared."""

    def _release(self) -> None:
        for found in list(self.manager.ledger.retentions.by_id.values()):
            if found.home.tenant.name == self._tenant:
                self.manager.sharing.release(self._tenant, found.retention_id)
                return


def seen_by_red(manager: BlockManager, seed: int) -> list[Any]:
    """What the tenant sees, but for numbers that name blocks, revisions and retentions."""
    servicer, rng = servicer_of(manager), random.Random(seed)  # noqa: S311 -- the same at every run
    blocks = all_pages(servicer.ListBlocks, pb.ListBlocksRequest(page_size=50), "blocks", "red")
    sequences = all_pages(
        servicer.ListSequences, pb.ListSequencesRequest(page_size=50), "sequences", "red"
    )
    pool = ask(servicer.GetPool, pb.GetPoolRequest(), "red")
    probes = [
        ask(servicer.ProbePrefix, pb.ProbePrefixRequest(token_ids=rng.choices((0, 1), k=9)), "red")
        for _ in range(20)
    ]
    return [
        sorted(
            (b.state, b.ref_count, b.pinned, b.sealed, b.block_hash, b.priority) for b in blocks
        ),
        [
            (s.sequence_id, s.num_computed_tokens, s.num_cached_tokens, s.num_blocks)
            for s in sequences
        ],
        [(p.num_cached_tokens, p.num_needed_blocks, p.num_in_progress_tokens) for p in probes],
        (
            pool.num_shared_blocks,
            pool.num_retained_blocks,
            pool.num_sequences,
            pool.num_token_slots,
        ),
        [t.num_blocks for t in ask(servicer.ListTenants, pb.ListTenantsRequest(), "red").tenants],
    ]


@settings(deadline=None, max_examples=25)
@given(SEEDS)
def test_no_answer_depends_on_another_tenants_blocks(seed: int) -> None:
    """A tenant alone in a pool, and beside another one that uses the same tokens and ids, is told the same."""
    alone = OneTenantDriver(new_manager(900, min_partial_tokens=2), seed, "red", 0)
    beside = OneTenantDriver(new_manager(900, min_partial_tokens=2), seed, "red", 0)
    other = OneTenantDriver(beside.manager, seed + 1, "blue", 500)
    for act in range(40):
        alone.act()
        other.act()
        beside.act()
        if act % 10 == 9:
            assert seen_by_red(beside.manager, act) == seen_by_red(alone.manager, act)


def test_only_blocks_of_the_tenant_are_shown() -> None:
    """ListBlocks shows no free block and no other tenant's, by whatever filter; GetBlock names no other's holder."""
    manager = new_manager(40)
    router = OneRouter(manager)
    manager.sharing.publish(ints([9] * 4))
    router.run(0, [9] * 4 + [1] * 4, tenant="red")
    router.run(1, [9] * 4 + [1] * 4, tenant="blue")
    servicer = servicer_of(manager)
    red = [
        found.block_id for found in ask(servicer.ListBlocks, pb.ListBlocksRequest(), "red").blocks
    ]
    blue = [
        found.block_id for found in ask(servicer.ListBlocks, pb.ListBlocksRequest(), "blue").blocks
    ]
    tables = tables_of(manager, None)
    assert red == [tables[0][1]]
    assert blue == [tables[1][1]]
    shared = pb.GetBlockRequest(block_id=tables[0][0])
    assert len(ask(servicer.GetBlock, shared).holders) == 2
    with pytest.raises(BlockNotFound):  # how many others hold it is nothing for a tenant to know
        ask(servicer.GetBlock, shared, "red")
    request = pb.ListBlocksRequest(sequence_id="s1")
    assert not ask(servicer.ListBlocks, request, "red").blocks


# Requests that are wrong

NO_TOKEN, OF_BLOCKS, OF_A_FLAG = "after:x", encode_page_token((1,)), encode_page_token((True,))


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("ListSequences", pb.ListSequencesRequest(page_size=-1), "page_size"),
        ("ListSequences", pb.ListSequencesRequest(page_token=NO_TOKEN), "page_token"),
        ("ListSequences", pb.ListSequencesRequest(page_token=OF_BLOCKS), "page_token"),
        ("ListBlocks", pb.ListBlocksRequest(page_size=-5), "page_size"),
        ("ListBlocks", pb.ListBlocksRequest(page_token=NO_TOKEN), "page_token"),
        ("ListBlocks", pb.ListBlocksRequest(page_token=OF_A_FLAG), "page_token"),
        ("ListBlocks", pb.ListBlocksRequest(state=9), "state"),
        ("ListBlocks", pb.ListBlocksRequest(min_ref_count=-1), "min_ref_count"),
        ("ListBlocks", pb.ListBlocksRequest(block_hash_prefix="xyz"), "block_hash_prefix"),
        ("ListBlocks", pb.ListBlocksRequest(block_hash_prefix="0" * 33), "block_hash_prefix"),
        ("ListBlocks", pb.ListBlocksRequest(min_idle_seconds=-1), "min_idle_seconds"),
        ("ListBlocks", pb.ListBlocksRequest(min_idle_seconds=float("nan")), "min_idle_seconds"),
        ("ProbePrefix", pb.ProbePrefixRequest(), "token_ids"),
        ("ProbePrefix", pb.ProbePrefixRequest(token_ids=[3, -1]), "token_ids[1]"),
        ("ProbePrefix", pb.ProbePrefixRequest(token_ids=[1] * 29), "token_ids"),
    ],
)
def test_a_wrong_field_is_named(method: str, request_: Any, field: str) -> None:
    """INVALID_ARGUMENT with the field that is wrong."""
    servicer = servicer_of(new_manager(8))
    with pytest.raises(InvalidRequest) as caught:
        ask(getattr(servicer, method), request_)
    assert [found.field for found in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("GetPool", pb.GetPoolRequest()),
        ("ListSequences", pb.ListSequencesRequest()),
        ("GetSequence", pb.GetSequenceRequest()),
        ("ListBlocks", pb.ListBlocksRequest()),
        ("GetBlock", pb.GetBlockRequest()),
        ("ListTenants", pb.ListTenantsRequest()),
        ("ListRetentions", pb.ListRetentionsRequest()),
        ("ProbePrefix", pb.ProbePrefixRequest(token_ids=[1])),
    ],
)
@pytest.mark.parametrize("tenants", [("red", "blue"), ("red", "red"), ("x" * 129,), ("a\nb",)])
def test_a_call_of_several_tenants_is_refused(
    method: str, request_: Any, tenants: tuple[str, ...]
) -> None:
    """One of the names may be somebody else's addition; nor does a name that is none narrow anything."""
    servicer = servicer_of(new_manager(8))
    with pytest.raises(InvalidRequest) as caught:
        ask(getattr(servicer, method), request_, *tenants)
    assert [found.field for found in caught.value.violations] == ["quire-tenant"]


# Integrity


def test_books_that_disagree_are_findings() -> None:
    """Of sound books there are none; a wrong count is told in a sentence, and to no tenant alone."""
    manager = new_manager(20)
    (block_id,) = OneRouter(manager).run(0, [1] * 3)
    servicer = servicer_of(manager)
    answer = ask(servicer.CheckIntegrity, pb.CheckIntegrityRequest())
    assert (list(answer.findings), answer.revision) == ([], str(manager.revision))
    manager.pool.ref_counts[block_id] += 1
    with pytest.raises(InvalidRequest, match="whole pool"):
        ask(servicer.CheckIntegrity, pb.CheckIntegrityRequest(), "red")
    (finding,) = ask(servicer.CheckIntegrity, pb.CheckIntegrityRequest()).findings
    assert finding == f"block {block_id} has ref_count 2, 1 tables hold it"
