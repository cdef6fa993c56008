"""The local picture of the pool against one kept in plain dictionaries."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from naive_pool import NaivePool, NaiveSequence

from protos.memory.v1 import inspection_pb2 as pb
from quire.client import PoolMirror
from quire.errors import BrokenContract

NUM_BLOCKS = 24
TENANTS = ("", "red", "blue")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class MirrorFollowsPool(RuleBasedStateMachine):
    """After every answer the mirror shows what the naive pool is."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = NaivePool(NUM_BLOCKS)
        self.mirror = PoolMirror(clock=Clock())
        self.names = count()
        self.steps = count(1)
        self.seen = self.pool.copy()
        self.read_snapshot(2)

    def read_snapshot(self, num_parts: int) -> None:
        for answer in self.pool.snapshot(num_parts):
            self.mirror.take(answer)

    def tell(self, session_id: str = "", step: int = 0) -> None:
        self.pool.revision += 1
        self.mirror.take(self.pool.change_since(self.seen, session_id, step))
        self.seen = self.pool.copy()

    def free_blocks(self) -> list[int]:
        return self.pool.blocks_in(pb.BLOCK_STATE_FREE)

    @rule(data=st.data(), session_id=st.sampled_from(("one", "two")))
    def step(self, data: st.DataObject, session_id: str) -> None:
        """Rows of a session progress, end, and begin anew in the same change; blocks are shared and evicted."""
        pool = self.pool
        for key, found in [item for item in pool.sequences.items() if item[0][0] == session_id]:
            found.num_computed_tokens += data.draw(st.integers(0, 3))
            what = data.draw(st.sampled_from(("go on", "grow", "remap", "end")))
            if what == "grow" and (free := self.free_blocks()):
                found.table.append(data.draw(st.sampled_from(free)))
            elif what == "remap" and found.table and (free := self.free_blocks()):
                found.table[data.draw(st.integers(0, len(found.table) - 1))] = free[0]
            elif what == "end":
                pool.cached |= set(found.table)
                pool.parting[key[1]] = found.num_computed_tokens
                del pool.sequences[key]
        if cached := pool.blocks_in(pb.BLOCK_STATE_CACHED):
            gone = set(data.draw(st.lists(st.sampled_from(cached), unique=True)))
            pool.cached -= gone
            pool.num_evictions += len(gone)
        row = data.draw(st.integers(0, 3))
        if (session_id, row) not in pool.sequences:
            self.admit(data, (session_id, row))
        self.tell(session_id, next(self.steps))

    def admit(self, data: st.DataObject, key: tuple[str, int]) -> None:
        pool = self.pool
        held = pool.blocks_in(pb.BLOCK_STATE_USED) + pool.blocks_in(pb.BLOCK_STATE_CACHED)
        hits = data.draw(st.lists(st.sampled_from(held), unique=True, max_size=3)) if held else []
        fresh = self.free_blocks()[: data.draw(st.integers(0, 2))]
        pool.num_query_tokens += 16 * len(hits) + 5
        pool.num_hit_tokens += 16 * len(hits)
        tenant = data.draw(st.sampled_from(TENANTS))
        cached_tokens = 16 * len(hits)
        pool.sequences[key] = NaiveSequence(
            f"request-{next(self.names)}/0", tenant, hits + fresh, cached_tokens, cached_tokens
        )

    @rule(session_id=st.sampled_from(("one", "two")))
    def lapse(self, session_id: str) -> None:
        """A session ends with all its sequences."""
        for key in [key for key in self.pool.sequences if key[0] == session_id]:
            del self.pool.sequences[key]
        self.tell(session_id)

    @rule(tenant=st.sampled_from(TENANTS), blocks=st.none() | st.integers(1, 9))
    def set_quota(self, tenant: str, blocks: int | None) -> None:
        """A tenant appears or goes with its quota."""
        self.pool.quotas.pop(tenant, None)
        if blocks is not None:
            self.pool.quotas[tenant] = blocks
        self.tell()

    @rule(num_parts=st.integers(1, 4), data=st.data())
    def fall_behind(self, num_parts: int, data: st.DataObject) -> None:
        """Changes are missed; the picture stays until the snapshot is whole, also when it is cut off once."""
        before = self.mirror.look()
        self.pool.cached ^= {data.draw(st.integers(1, NUM_BLOCKS - 1))}
        self.pool.revision += 5
        self.mirror.take(self.pool.missed())
        for answer in self.pool.snapshot(num_parts)[: num_parts - 1]:
            self.mirror.take(answer)
        after = self.mirror.look()
        assert before is not None
        assert after is not None
        assert after.states.tolist() == before.states.tolist()
        assert self.mirror.begin_stream() != self.pool.token
        self.read_snapshot(num_parts)
        self.seen = self.pool.copy()

    @precondition(lambda self: not self.pool.sequences)
    @rule()
    def restart(self) -> None:
        """The service comes back with another epoch and an empty pool."""
        self.pool = NaivePool(NUM_BLOCKS, epoch=self.pool.epoch + "1")
        self.mirror.begin_stream()
        self.read_snapshot(1)
        self.seen = self.pool.copy()

    @invariant()
    def the_picture_is_the_pool(self) -> None:
        """Blocks, tables, tenants, counts, revision and token agree."""
        view, pool = self.mirror.look(), self.pool
        assert view is not None
        assert (view.epoch, view.revision) == (pool.epoch, str(pool.revision))
        assert view.states.tolist() == pool.states()
        assert view.ref_counts.tolist() == pool.ref_counts()
        assert {
            key: (one.sequence_id, one.tenant, one.block_table, one.num_computed_tokens)
            for key, one in view.sequences.items()
        } == {
            key: (one.sequence_id, one.tenant, one.table, one.num_computed_tokens)
            for key, one in pool.sequences.items()
        }
        assert {
            name: (one.num_blocks, one.num_sequences, one.hard_quota_blocks)
            for name, one in view.tenants.items()
            if not one.is_idle
        } == {
            name: (one.num_blocks, one.num_sequences, pool.quotas.get(name))
            for name, one in pool.tenants().items()
        }
        assert view.counts.num_free_blocks == len(pool.blocks_in(pb.BLOCK_STATE_FREE))
        assert view.counts.num_evictions == pool.num_evictions
        assert self.mirror.begin_stream() == pool.token


TestMirrorFollowsPool = MirrorFollowsPool.TestCase
TestMirrorFollowsPool.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def followed(clock: Clock) -> tuple[PoolMirror, NaivePool]:
    """A mirror of a pool in which one sequence runs."""
    pool = NaivePool(NUM_BLOCKS)
    pool.sequences["one", 0] = NaiveSequence("a/0", "", [1], 4)
    mirror = PoolMirror(clock=clock, window_s=10)
    mirror.take(pool.snapshot()[0])
    return mirror, pool


def test_rates_are_of_the_window() -> None:
    """Twenty steps of 3 tokens in two seconds; ten seconds later nothing of them is left."""
    clock = Clock()
    mirror, pool = followed(clock)
    for step in range(20):
        clock.now += 0.1
        before = pool.copy()
        pool.revision += 1
        pool.sequences["one", 0].num_computed_tokens += 3
        pool.num_evictions += 1
        pool.num_query_tokens += 10
        pool.num_hit_tokens += 4
        mirror.take(pool.change_since(before, "one", step + 1))
    view = mirror.look()
    assert view is not None
    assert view.rates.seconds == pytest.approx(2.0)
    assert view.rates.steps_per_s == pytest.approx(10.0)
    assert view.rates.tokens_per_s == pytest.approx(30.0)
    assert view.rates.evictions_per_s == pytest.approx(10.0)
    assert view.rates.hit_rate == pytest.approx(0.4)
    clock.now += 10.5
    view = mirror.look()
    assert view is not None
    assert (view.rates.steps_per_s, view.rates.hit_rate) == (0.0, None)
    assert view.rates.seconds == 10.0


def test_what_is_no_step_counts_as_none() -> None:
    """A change outside of steps leaves the rate of steps alone."""
    clock = Clock()
    mirror, pool = followed(clock)
    clock.now += 1
    before = pool.copy()
    pool.quotas["red"] = 3
    mirror.take(pool.change_since(before))
    view = mirror.look()
    assert view is not None
    assert view.rates.steps_per_s == 0


def test_a_look_is_a_copy() -> None:
    """What was seen does not change when the pool does."""
    mirror, pool = followed(Clock())
    view, before = mirror.look(), pool.copy()
    assert view is not None
    pool.sequences["one", 0].table.append(2)
    mirror.take(pool.change_since(before, "one", 1))
    assert view.sequences["one", 0].block_table == [1]
    assert view.ref_counts[2] == 0


def test_ages_go_on() -> None:
    """A sequence that was 3 seconds old at the snapshot is 5 two seconds later."""
    clock = Clock()
    mirror, _ = followed(clock)
    clock.now += 2
    view = mirror.look()
    assert view is not None
    assert view.now - view.sequences["one", 0].admitted_at == pytest.approx(5.0)


@pytest.mark.parametrize(
    "delta",
    [
        pb.WatchDelta(session_id="one", progressed_rows=[7], progressed_num_computed_tokens=[3]),
        pb.WatchDelta(session_id="one", progressed_rows=[0]),
        pb.WatchDelta(session_id="two", ended=[pb.EndedSequence(row=0)]),
        pb.WatchDelta(session_id="one", table_rows=[0], table_indexes=[5], table_block_ids=[3]),
        pb.WatchDelta(changed_block_ids=[99], changed_states=[1], changed_ref_counts=[0]),
    ],
)
def test_a_change_that_does_not_fit_is_refused(delta: pb.WatchDelta) -> None:
    """An unknown row, a missing number, a hole in a table, an unknown block: BrokenContract, and the token stays."""
    mirror, pool = followed(Clock())
    with pytest.raises(BrokenContract, match="revision 9"):
        mirror.take(
            pb.WatchResponse(epoch="1", revision="9", resume_token=f"{pool.epoch}:9", delta=delta)
        )
    assert mirror.begin_stream() == pool.token


def test_after_forgetting_only_a_snapshot_fits() -> None:
    """The last picture stays, the token is gone, and a change without a snapshot is refused."""
    mirror, pool = followed(Clock())
    mirror.forget()
    assert mirror.begin_stream() == ""
    assert mirror.look() is not None
    with pytest.raises(BrokenContract):
        mirror.take(pool.change_since(pool.copy()))
    mirror.take(pool.snapshot()[0])
    assert mirror.begin_stream() == pool.token


def test_a_snapshot_with_a_hole_is_refused() -> None:
    """Parts that leave a block out are no picture."""
    pool, mirror = NaivePool(NUM_BLOCKS), PoolMirror()
    answer = pool.snapshot()[0]
    del answer.snapshot.block_runs[5]
    with pytest.raises(BrokenContract):
        mirror.take(answer)
    assert mirror.look() is None
