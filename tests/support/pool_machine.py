"""The block manager under any sequence of calls, against a naive model of what each slot holds and who may read it."""

from __future__ import annotations

from typing import Any

import numpy as np
from flushing import flush
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memory_service.block_hash import BlockHasher
from memory_service.block_manager import BlockManager
from memory_service.demand import Admit, Fork, StepAnswer, StepDemand
from memory_service.fold import Fold
from memory_service.integrity import check_integrity
from memory_service.record import Record, ReleaseReason, SessionOpened
from memory_service.sharing import Verdict
from memory_service.snapshot import export_state, import_state

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
        self.session_key = SESSION
        self.begin()
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

    def begin(self) -> None:
        """Make the manager with a session, and its shadow."""
        self.manager = make_manager(min_partial_tokens=2, clock=lambda: self.now)
        self.shadow = make_manager(opened=False)
        Fold(self.shadow).apply(Record(1, 1000.0, SessionOpened(SESSION, "s", NUM_ROWS, 1)))
        self.manager.on_record = Fold(self.shadow).apply

    def apply(self, demand: StepDemand) -> StepAnswer:
        """One step of the session."""
        return self.manager.apply(self.session_key, demand)

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
        answer = self.apply(
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

    @rule(data=st.data())
    def control(self, data: st.DataObject) -> None:
        """One call that no request needs. One rule for all of them, since steps should be most of what happens."""
        calls = [self._set_quota, self._retain, self._release, self._let_time_pass]
        calls += [self._flush, self._publish, self._withdraw]
        data.draw(st.sampled_from(calls))(data)

    def _set_quota(self, data: st.DataObject) -> None:
        tenant = data.draw(TENANTS)
        soft = data.draw(st.none() | st.integers(0, 8))
        hard = data.draw(st.none() | st.integers(1, 6))
        held = self.manager.pool.tenants.get(tenant)
        if hard is not None and held is not None:
            hard = max(hard, held.num_blocks)  # so that the bound holds from now on
        self.manager.sharing.set_quota(tenant, soft, hard)
        self.quotas[tenant] = (soft, hard)

    def _retain(self, data: st.DataObject) -> None:
        if not self.sequences:
            return
        row = data.draw(st.sampled_from(sorted(self.sequences)))
        priority, lives = data.draw(st.integers(1, 7)), data.draw(st.none() | st.integers(1, 5))
        found, expires_at = self.sequences[row], None if lives is None else self.now + lives
        sharing = self.manager.sharing
        if data.draw(st.booleans()):
            outcome = sharing.retain_prefix(found.tenant, ints(found.tokens), priority, expires_at)
        else:
            sequence_id = self.manager.table(self.session_key)[row].sequence_id
            outcome = sharing.retain_sequence(found.tenant, sequence_id, priority, expires_at)
        if outcome.made_id:
            self.retained.append((found.tenant, outcome.made_id))
        assert (outcome.verdict is Verdict.REJECTED) == (not outcome.made_id)

    def _release(self, data: st.DataObject) -> None:
        if self.retained:
            tenant, retention_id = data.draw(st.sampled_from(self.retained))
            self.manager.sharing.release(tenant, retention_id)

    def _let_time_pass(self, data: st.DataObject) -> None:
        self.now += data.draw(st.integers(0, 4))
        self.manager.sharing.expire(self.now)

    def _flush(self, data: st.DataObject) -> None:
        tenant, tokens = data.draw(TENANTS), data.draw(st.lists(st.integers(0, 1), max_size=9))
        flush(self.manager, tenant, ints(tokens))
        if not tokens and not self.published:
            assert self.manager.probe(ints([0] * 9), tenant).block_ids == []

    def _publish(self, data: st.DataObject) -> None:
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=9))
        outcome = self.manager.sharing.publish(ints(tokens))
        if outcome.made_id:
            self.published[outcome.made_id] = tokens[: outcome.num_blocks]

    def _withdraw(self, data: st.DataObject) -> None:
        if self.published:
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
            assert self.manager.table(self.session_key).block_table(row).tolist() == found.table
        for tenant, (_, hard) in self.quotas.items():
            held = self.manager.pool.tenants.get(tenant)
            assert hard is None or held is None or held.num_blocks <= hard

    @invariant()
    def fold_of_the_records_is_the_state(self) -> None:
        assert export_state(self.shadow) == export_state(self.manager)

    def teardown(self) -> None:
        self.manager.close_session(self.session_key)
        assert check_integrity(self.manager) == []
        assert export_state(self.shadow) == export_state(self.manager)
        assert self.manager.pool.num_available == NUM_BLOCKS - 1
