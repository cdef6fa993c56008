"""The block manager under any sequence of steps, against a naive model of what each slot holds."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from memory_service.block_hash import BlockHasher
from memory_service.block_manager import BlockManager
from memory_service.block_pool import BlockPool
from memory_service.demand import Admit, Fork, RefusalReason, StepAnswer, StepDemand
from memory_service.fold import Fold
from memory_service.integrity import check_integrity
from memory_service.record import Record, ReleaseReason, SessionOpened
from memory_service.sharing import Verdict
from memory_service.slots import SlotAllocator
from memory_service.snapshot import export_state, import_state
from quire.errors import BrokenContract

if TYPE_CHECKING:
    from memory_service.sequence_table import SequenceTable

SIZE = 4
NUM_BLOCKS = 14
NUM_ROWS = 6
SESSION = 1
TENANTS = st.sampled_from(["", "a", "b"])


def ints(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def make_manager(
    num_blocks: int = NUM_BLOCKS, *, opened: bool = True, **options: Any
) -> BlockManager:
    manager = BlockManager(num_blocks, SIZE, BlockHasher(b"secret", b"root"), **options)
    if opened:
        manager.open_session(SESSION, NUM_ROWS, "s")
    return manager


class NaiveSequence:
    """Tokens, how many are computed, and the table as the compute service would know it."""

    def __init__(self, tokens: list[int], computed: int, table: list[int], tenant: str) -> None:
        self.tokens = tokens
        self.computed = computed
        self.table = table
        self.tenant = tenant
        self.committed = computed
        self.in_flight: list[tuple[int, int]] = []  # (step, tokens)

    @property
    def start(self) -> int:
        """First position that the next step runs."""
        return self.computed + sum(count for _, count in self.in_flight)

    def fork(self) -> NaiveSequence:
        """A child that shares all that is computed or in flight."""
        child = NaiveSequence(self.tokens[: self.start], self.computed, [], self.tenant)
        child.in_flight = list(self.in_flight)
        return child


class PoolMachine(RuleBasedStateMachine):
    """Each slot of the naive device holds the whole prefix of tokens that was stored there; reads must match.

    Two steps are in flight: a step's stores reach the device one step after its answer was given. A second manager is fed
    with nothing but the records of the first and must be in the same state after each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.manager = make_manager(min_partial_tokens=2, clock=lambda: self.now)
        self.shadow = make_manager(opened=False)
        Fold(self.shadow).apply(Record(1, 1000.0, SessionOpened(SESSION, "s", NUM_ROWS, 1)))
        self.manager.on_record = Fold(self.shadow).apply
        self.device: dict[int, tuple[int, ...]] = {}
        self.makers: dict[int, str] = {}  # slot -> tenant whose step stored it
        self.quotas: dict[str, tuple[int | None, int | None]] = {}
        self.published: dict[int, list[int]] = {}
        self.retained: list[tuple[str, int]] = []
        self.sequences: dict[int, NaiveSequence] = {}
        self.step = 0
        self.acknowledged = 0
        # Steps in flight: number, copies, and what each row stores.
        self.queue: list[tuple[int, list, list]] = []

    def _device_runs(self) -> None:
        """Run the oldest step in flight: copies, stores, reads, in this order."""
        step, copies, work = self.queue.pop(0)
        read = [
            [(dst * SIZE + i, src * SIZE + i, self.device.get(src * SIZE + i)) for i in range(SIZE)]
            for src, dst in copies
        ]
        makers = dict(self.makers)
        for slots in read:
            for slot, source, held in slots:
                self.device[slot] = held
                self.makers[slot] = makers.get(source, "")
        for tokens, table, begin, end, tenant in work:
            for position in range(begin, end):
                slot = table[position // SIZE] * SIZE + position % SIZE
                self.device[slot] = tuple(tokens[: position + 1])
                self.makers[slot] = tenant
        for tokens, table, _, end, tenant in work:
            for position in range(end):
                slot = table[position // SIZE] * SIZE + position % SIZE
                assert self.device.get(slot) == tuple(tokens[: position + 1])
                assert self.makers[slot] == tenant or self._was_published(tokens[: position + 1])
        self.acknowledged = step
        for sequence in self.sequences.values():
            sequence.computed += sum(count for ran, count in sequence.in_flight if ran == step)
            sequence.in_flight = [found for found in sequence.in_flight if found[0] != step]

    def _was_published(self, tokens: list[int]) -> bool:
        """Withdrawn ones included: who hit them before keeps them."""
        return any(tokens == found[: len(tokens)] for found in self.published.values())

    def _commits(self) -> tuple[list[int], list[int], list[int]]:
        rows, counts, token_ids = [], [], []
        for row, found in self.sequences.items():
            if found.computed > found.committed:
                rows.append(row)
                counts.append(found.computed)
                begin = found.committed // SIZE * SIZE
                token_ids += found.tokens[begin : found.computed // SIZE * SIZE]
                found.committed = found.computed
        return rows, counts, token_ids

    @rule(
        data=st.data(),
        admit_lengths=st.lists(st.integers(1, 18), max_size=3),
        budget=st.integers(0, 20),
        watermark=st.integers(0, 3),
    )
    def run_step(
        self, data: st.DataObject, admit_lengths: list[int], budget: int, watermark: int
    ) -> None:
        self.step += 1
        self.now += 1
        rows, counts, token_ids = self._commits()
        releases = [row for row in list(self.sequences) if data.draw(st.integers(0, 5)) == 0]
        for row in releases:
            del self.sequences[row]
        forks, extends = [], []
        for row, found in list(self.sequences.items()):
            dst = next((r for r in range(NUM_ROWS) if r not in self.sequences), None)
            if dst is not None and found.start and data.draw(st.integers(0, 3)) == 0:
                forks.append(Fork(row, dst, 1, f"f{self.step}-{dst}", "r", found.start))
                self.sequences[dst] = found.fork()
        for row, found in self.sequences.items():
            start = found.start
            if data.draw(st.booleans()):
                count = data.draw(st.integers(1, 5))
                while len(found.tokens) < start + count:
                    found.tokens.append(data.draw(st.integers(0, 2)))
                extends.append((row, start, count))
        unused = [row for row in range(NUM_ROWS) if row not in self.sequences]
        admits = []
        for row, length in zip(unused, admit_lengths, strict=False):
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
            tenant = data.draw(TENANTS)
            admits.append(Admit(row, 1, f"s{self.step}-{row}", "r", ints(tokens), tenant=tenant))
        answer = self.manager.apply(
            SESSION,
            StepDemand(
                step=self.step,
                acknowledged_step=self.acknowledged,
                commit_rows=ints(rows),
                commit_num_computed_tokens=ints(counts),
                commit_token_ids=ints(token_ids),
                releases=tuple(releases),
                release_reasons=(ReleaseReason.FINISHED,) * len(releases),
                forks=tuple(forks),
                extend_rows=ints([row for row, _, _ in extends]),
                extend_starts=ints([start for _, start, _ in extends]),
                extend_num_tokens=ints([count for _, _, count in extends]),
                admits=tuple(admits),
                admit_token_budget=budget,
                watermark_blocks=watermark,
            ),
        )
        self._take(answer, extends, admits)
        while len(self.queue) > 1:
            self._device_runs()

    def _take(self, answer: StepAnswer, extends: list, admits: list) -> None:
        refused = {row for row, _ in answer.refusals}
        assert len(answer.shortages) == len(answer.refusals)
        for row, table in answer.forked_tables:
            self.sequences[row].table = table.tolist()
        for row, block_id in answer.new_blocks:
            self.sequences[row].table.append(block_id)
        for row, index, block_id in answer.remaps:
            self.sequences[row].table[index] = block_id
        work = []
        for row, start, count in extends:
            found = self.sequences[row]
            if row in refused:
                continue
            found.in_flight.append((self.step, count))
            work.append((list(found.tokens), list(found.table), start, start + count, found.tenant))
        by_row = {admit.row: admit for admit in admits}
        for admission in answer.admissions:
            tokens = by_row[admission.row].token_ids.tolist()
            tenant = by_row[admission.row].tenant
            found = NaiveSequence(
                tokens, admission.num_cached_tokens, admission.block_table.tolist(), tenant
            )
            found.in_flight = [(self.step, admission.num_scheduled_tokens)]
            self.sequences[admission.row] = found
            begin = admission.num_cached_tokens
            assert admission.num_scheduled_tokens >= 1
            end = begin + admission.num_scheduled_tokens
            work.append((tokens, list(found.table), begin, end, tenant))
        assert not {src for src, _ in answer.copies} & {dst for _, dst in answer.copies}
        self.queue.append((self.step, answer.copies, work))

    @precondition(lambda self: self.queue)
    @rule()
    def device_catches_up(self) -> None:
        self._device_runs()

    @rule(
        tenant=TENANTS,
        soft=st.none() | st.integers(0, 8),
        hard=st.none() | st.integers(1, 10),
    )
    def set_quota(self, tenant: str, soft: int | None, hard: int | None) -> None:
        held = self.manager.pool.tenants.get(tenant)
        if hard is not None and held is not None:
            hard = max(hard, held.num_blocks)  # so that the bound holds from now on
        self.manager.sharing.set_quota(tenant, soft, hard)
        self.quotas[tenant] = (soft, hard)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), priority=st.integers(1, 7), lives=st.none() | st.integers(1, 5))
    def retain(self, data: st.DataObject, priority: int, lives: int | None) -> None:
        row = data.draw(st.sampled_from(sorted(self.sequences)))
        found, expires_at = self.sequences[row], None if lives is None else self.now + lives
        sharing = self.manager.sharing
        if data.draw(st.booleans()):
            outcome = sharing.retain_prefix(found.tenant, ints(found.tokens), priority, expires_at)
        else:
            sequence_id = self.manager.table(SESSION)[row].sequence_id
            outcome = sharing.retain_sequence(found.tenant, sequence_id, priority, expires_at)
        if outcome.made_id:
            self.retained.append((found.tenant, outcome.made_id))
        assert (outcome.verdict is Verdict.REJECTED) == (not outcome.made_id)

    @precondition(lambda self: self.retained)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        tenant, retention_id = data.draw(st.sampled_from(self.retained))
        self.manager.sharing.release(tenant, retention_id)

    @rule(seconds=st.integers(0, 4))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        self.manager.sharing.expire(self.now)

    @rule(tenant=TENANTS, tokens=st.lists(st.integers(0, 1), max_size=9))
    def flush(self, tenant: str, tokens: list[int]) -> None:
        while not self.manager.sharing.flush(tenant, ints(tokens)).is_done:
            pass
        if not tokens:
            assert self.manager.probe(ints([0] * 9), tenant).block_ids == [] or self.published

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def publish(self, tokens: list[int]) -> None:
        outcome = self.manager.sharing.publish(ints(tokens))
        if outcome.made_id:
            self.published[outcome.made_id] = tokens[: outcome.num_blocks]

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        self.manager.sharing.withdraw(data.draw(st.sampled_from(sorted(self.published))))

    @rule()
    def restart(self) -> None:
        """The manager gives way to one made from its snapshot."""
        again = make_manager(opened=False, min_partial_tokens=2, clock=lambda: self.now)
        import_state(again, export_state(self.manager))
        again.on_record = Fold(self.shadow).apply
        self.manager = again

    @invariant()
    def books_agree(self) -> None:
        assert check_integrity(self.manager) == []
        for row, found in self.sequences.items():
            assert self.manager.table(SESSION).block_table(row).tolist() == found.table
        for tenant, (_, hard) in self.quotas.items():
            held = self.manager.pool.tenants.get(tenant)
            assert hard is None or held is None or held.num_blocks <= hard

    @invariant()
    def fold_of_the_records_is_the_state(self) -> None:
        assert export_state(self.shadow) == export_state(self.manager)

    def teardown(self) -> None:
        self.manager.close_session(SESSION)
        assert check_integrity(self.manager) == []
        assert export_state(self.shadow) == export_state(self.manager)
        assert self.manager.pool.num_available == NUM_BLOCKS - 1


PoolMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("QUIRE_TEST_EXAMPLES", "150")),
    stateful_step_count=25,
    deadline=None,
)
test_every_slot_holds_what_its_readers_expect = PoolMachine.TestCase


def never_shared(
    _: SlotAllocator, __: SequenceTable, rows: np.ndarray, *___: np.ndarray
) -> np.ndarray:
    return np.zeros(len(rows), dtype=np.int32)


MUTATIONS: dict[str, tuple[type, str, Any]] = {
    "no copy before a shared block is written": (SlotAllocator, "_num_shared", never_shared),
    "no pin for the source of a copy": (BlockPool, "pin", lambda _, __: None),
    "a tail that is kept by one reference too few": (
        BlockPool,
        "acquire",
        lambda pool, block_id: (
            pool.queue.remove(block_id, pool.home_of(block_id))
            if pool._is_cached(block_id)
            else None
        ),
    ),
    "a block is freed while it is held": (
        BlockPool,
        "_settle",
        lambda pool, block_id: pool.free.append(block_id),
    ),
}


@pytest.mark.parametrize("name", sorted(MUTATIONS))
def test_the_machine_notices_a_broken_manager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule, broken on purpose, makes the test above fail."""
    monkeypatch.setattr(*MUTATIONS[name])
    with pytest.raises(Exception):  # noqa: B017, PT011 -- whichever check sees it first
        run_state_machine_as_test(
            PoolMachine,
            settings=settings(
                max_examples=200,
                stateful_step_count=25,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
            ),
        )


def admit(
    manager: BlockManager, row: int, tokens: list[int], step: int, budget: int = 99
) -> StepAnswer:
    demand = StepDemand(
        step=step, admits=(Admit(row, 1, f"s{row}", "r", ints(tokens)),), admit_token_budget=budget
    )
    return manager.apply(SESSION, demand)


def test_prefix_in_progress_waits_and_then_hits() -> None:
    """A prompt whose next block a running sequence computes is passed over, and hits once that is committed."""
    manager = make_manager()
    tokens = list(range(9))
    admit(manager, 0, tokens, 1)
    assert admit(manager, 1, tokens, 2).refusals == [(1, RefusalReason.PREFIX_IN_PROGRESS)]
    commit = StepDemand(
        step=3,
        commit_rows=ints([0]),
        commit_num_computed_tokens=ints([9]),
        commit_token_ids=ints(tokens[:8]),
    )
    manager.apply(SESSION, commit)
    (admission,) = admit(manager, 1, tokens, 4).admissions
    assert (admission.num_cached_tokens, admission.num_scheduled_tokens) == (8, 1)
    assert manager.table(SESSION).block_table(0)[:2].tolist() == admission.block_table[:2].tolist()


def test_a_hit_leaves_a_token_to_run() -> None:
    """A prompt that is wholly cached and ends with a full block runs that block again: its last logits are needed."""
    manager = make_manager()
    tokens = list(range(8))
    admit(manager, 0, tokens, 1)
    commit = StepDemand(
        step=2,
        commit_rows=ints([0]),
        commit_num_computed_tokens=ints([8]),
        commit_token_ids=ints(tokens),
    )
    manager.apply(SESSION, commit)
    (admission,) = admit(manager, 1, tokens, 3).admissions
    assert (admission.num_cached_tokens, admission.num_scheduled_tokens) == (4, 4)


@pytest.mark.parametrize(("num_blocks", "fits"), [(5, False), (6, True)])
def test_siblings_count_at_admission(num_blocks: int, *, fits: bool) -> None:
    """Three samples of a prompt of three blocks need two copies of the last one besides."""
    manager = make_manager(num_blocks)
    demand = StepDemand(
        step=1,
        admits=(Admit(0, 1, "a", "a", ints(list(range(10))), num_sequences=3),),
        admit_token_budget=99,
    )
    assert bool(manager.apply(SESSION, demand).admissions) == fits


@pytest.mark.parametrize(("watermark", "fits"), [(2, True), (3, False)])
def test_admissions_leave_the_watermark_unless_alone(watermark: int, *, fits: bool) -> None:
    """A second sequence must leave as many blocks as the watermark says; the first one need not."""
    manager = make_manager(num_blocks=6)
    admit(manager, 0, list(range(8)), 1)
    demand = StepDemand(
        step=2,
        admits=(Admit(1, 1, "b", "b", ints([90])),),
        admit_token_budget=99,
        watermark_blocks=watermark,
    )
    assert bool(manager.apply(SESSION, demand).admissions) == fits
    alone = make_manager(num_blocks=3)
    demand = StepDemand(
        step=1,
        admits=(Admit(0, 1, "a", "a", ints(list(range(8)))),),
        admit_token_budget=99,
        watermark_blocks=5,
    )
    assert alone.apply(SESSION, demand).admissions


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    """What is evicted first is what no later prompt can use without the rest."""
    manager = make_manager(num_blocks=4)
    tokens = list(range(12))
    admit(manager, 0, tokens, 1)
    commit = {
        "commit_rows": ints([0]),
        "commit_num_computed_tokens": ints([12]),
        "commit_token_ids": ints(tokens),
    }
    manager.apply(SESSION, StepDemand(step=2, releases=(0,), **commit))
    admit(manager, 1, [50], 3)
    manager.apply(SESSION, StepDemand(step=4, releases=(1,)))
    (admission,) = admit(manager, 2, tokens, 5).admissions
    assert admission.num_cached_tokens == 8


def test_the_same_tokens_behind_another_prefix_are_another_block() -> None:
    """The key of a block depends on everything before it."""
    manager = make_manager()
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    admit(manager, 0, tokens, 1)
    commit = {
        "commit_rows": ints([0]),
        "commit_num_computed_tokens": ints([8]),
        "commit_token_ids": ints(tokens),
    }
    manager.apply(SESSION, StepDemand(step=2, releases=(0,), **commit))
    (admission,) = admit(manager, 1, [9, 9, 9, 9, *tokens[4:], 0], 3).admissions
    assert admission.num_cached_tokens == 0
    (admission,) = admit(manager, 2, [*tokens[4:], 0], 4).admissions
    assert admission.num_cached_tokens == 0


def test_scarcity_is_a_refusal_and_ends_the_admissions() -> None:
    """Who comes behind a refused admission is refused too, even when there were blocks for it."""
    manager = make_manager(num_blocks=6)
    demand = StepDemand(
        step=1,
        admits=(
            Admit(0, 1, "a", "a", ints([1] * 8)),
            Admit(1, 1, "b", "b", ints([2] * 20)),
            Admit(2, 1, "c", "c", ints([3] * 4)),
        ),
        admit_token_budget=99,
    )
    answer = manager.apply(SESSION, demand)
    assert [found.row for found in answer.admissions] == [0]
    assert answer.refusals == [(1, RefusalReason.NO_BLOCKS), (2, RefusalReason.NO_BLOCKS)]


def test_nobody_overtakes_a_running_sequence_that_lacks_blocks() -> None:
    """Behind a refused extend, those that need blocks are refused too; those that need none run on."""
    manager = make_manager(num_blocks=5)
    for row, length in enumerate((4, 4, 3)):
        admit(manager, row, [10 * row + i for i in range(length)], row + 1)
    demand = StepDemand(
        step=9,
        extend_rows=ints([0, 1, 2]),
        extend_starts=ints([4, 4, 3]),
        extend_num_tokens=ints([5, 1, 1]),
    )
    answer = manager.apply(SESSION, demand)
    assert answer.refusals == [(0, RefusalReason.NO_BLOCKS), (1, RefusalReason.NO_BLOCKS)]
    assert answer.new_blocks == []


@pytest.mark.parametrize(
    "demand",
    [
        StepDemand(step=1, releases=(3,)),
        StepDemand(
            step=1, extend_rows=ints([2]), extend_starts=ints([0]), extend_num_tokens=ints([1])
        ),
        StepDemand(
            step=1, extend_rows=ints([0]), extend_starts=ints([0]), extend_num_tokens=ints([0])
        ),
        StepDemand(step=1, commit_rows=ints([0]), commit_num_computed_tokens=ints([8])),
        StepDemand(step=1, commit_rows=ints([0]), commit_num_computed_tokens=ints([80])),
        StepDemand(
            step=1, extend_rows=ints([0]), extend_starts=ints([13]), extend_num_tokens=ints([1])
        ),
        StepDemand(
            step=1,
            extend_rows=ints([0]),
            extend_starts=ints([9]),
            extend_num_tokens=ints([2**31 - 1]),
        ),
        StepDemand(step=1, watermark_blocks=-1),
        StepDemand(step=1, forks=(Fork(0, 0, 1, "x", "r", 1),)),
        StepDemand(step=1, admits=(Admit(NUM_ROWS, 1, "x", "r", ints([1])),)),
        StepDemand(step=1, admits=(Admit(1, 1, "x", "r", ints([])),)),
    ],
)
def test_a_broken_contract_changes_nothing(demand: StepDemand) -> None:
    """A demand that cannot be meant raises and leaves every count as it was."""
    manager = make_manager()
    admit(manager, 0, [1] * 9, 1)
    before = (
        manager.revision,
        manager.pool.num_available,
        manager.table(SESSION).num_computed.tolist(),
    )
    with pytest.raises(BrokenContract):
        manager.apply(SESSION, demand)
    after = (
        manager.revision,
        manager.pool.num_available,
        manager.table(SESSION).num_computed.tolist(),
    )
    assert after == before
    assert check_integrity(manager) == []
