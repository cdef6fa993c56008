"""A node without processes: the real block manager, and a device that only remembers which tokens a slot was given."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from simulated_requests import next_token

from bench.in_process_demand import demand_of, memory_answer
from memory_service.block_hash import BlockHasher
from memory_service.block_manager import BlockManager
from router.step import StepFailure, StepResult

if TYPE_CHECKING:
    from router.scheduler import Scheduler
    from router.step import MemoryAnswer, StepBatch, StepPlan

SESSION = 1
MAX_STEPS = 2000
POISON = 96  # a step that runs this token fails


class SimulatedMemory:
    """The block manager behind the router's nouns."""

    def __init__(
        self, num_blocks: int, block_size: int, num_rows: int, min_partial_tokens: int = 0
    ) -> None:
        self.num_rows = num_rows
        self.manager = BlockManager(
            num_blocks,
            block_size,
            BlockHasher(b"secret", b"root"),
            min_partial_tokens=min_partial_tokens,
        )
        self.manager.open_session(SESSION, num_rows)

    def set_hard_quota(self, tenant: str, num_blocks: int | None) -> None:
        self.manager.sharing.set_quota(tenant, None, num_blocks)

    def sequence_id(self, row: int) -> str:
        return self.manager.table(SESSION)[row].sequence_id

    def held_rows(self) -> list[int]:
        return [row for row, _ in self.manager.table(SESSION).items()]

    def allocate(self, plan: StepPlan) -> MemoryAnswer:
        return memory_answer(self.manager.apply(SESSION, demand_of(plan)))


class SimulatedDevice:
    """Knows rows only by what the steps told; every slot holds the tokens up to its own position."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.slots: dict[int, tuple[int, ...]] = {}
        self._tables: dict[int, list[int]] = {}
        self._tokens: dict[int, list[int]] = {}
        self._outputs: deque[tuple[int, list[int]]] = deque(maxlen=2)
        self._needs_reset = True
        self._last_step = 0

    def crash(self) -> None:
        """Forget the rows, keep the slots."""
        self._tables.clear()
        self._tokens.clear()
        self._outputs.clear()
        self._needs_reset = True

    def execute(self, batch: StepBatch) -> StepResult | StepFailure:
        assert batch.step > self._last_step
        self._last_step = batch.step
        if self._needs_reset and not batch.reset:
            return StepFailure(batch.step, "")  # sent before its sender heard of a failure
        if batch.reset:
            self.crash()
        self._needs_reset = False
        self._take(batch)
        if any(POISON in sequence.token_ids for sequence in batch.work.sequences):
            self.crash()
            return StepFailure(batch.step, "poison")
        for work in batch.work:
            self._run(work.row, work.start, work.start + work.num_tokens)
        token_ids = [
            next_token(tuple(self._tokens[found.source_row]), found.sequence.sample_index)
            for found in batch.outputs
        ]
        self._keep(batch, token_ids)
        return StepResult(batch.step, token_ids, batch.outputs.incarnations, {}, device_us=0)

    def _take(self, batch: StepBatch) -> None:
        for row in batch.drop_rows:
            self._tables.pop(row, None)
            self._tokens.pop(row, None)
        for new in batch.new_rows:
            self._tables[new.row] = list(new.block_table)
            self._tokens[new.row] = new.token_ids.tolist()
        for fork in batch.forks:
            outputs = dict(self._outputs)[fork.source_step]
            shared = self._tokens[fork.parent_row][: fork.num_tokens]
            self._tables[fork.child.row] = list(fork.child.block_table)
            self._tokens[fork.child.row] = [*shared, outputs[fork.source_output]]
        for row, block_id in batch.appends:
            self._tables[row].append(block_id)
        for row, index, block_id in batch.remaps:
            self._tables[row][index] = block_id
        for row, step, output in batch.pending:
            assert self._tokens[row][-1] == dict(self._outputs)[step][output]
        self._copy(batch)

    def _copy(self, batch: StepBatch) -> None:
        groups = [[found] for found in batch.copies] if batch.reset else [batch.copies]
        for group in groups:
            # In one step all copies read before any writes.
            read = [
                (self._slot(dst, offset), self.slots.get(self._slot(src, offset), ()))
                for src, dst in group
                for offset in range(self._block_size)
            ]
            self.slots.update(read)

    def _slot(self, block_id: int, offset: int) -> int:
        assert block_id > 0
        return block_id * self._block_size + offset

    def _run(self, row: int, start: int, end: int) -> None:
        tokens, table = self._tokens[row], self._tables[row]
        assert 0 <= start < end <= len(tokens)
        for position in range(end):
            slot = self._slot(table[position // self._block_size], position % self._block_size)
            if position >= start:
                self.slots[slot] = tuple(tokens[: position + 1])
            assert self.slots.get(slot) == tuple(tokens[: position + 1]), (row, position)

    def _keep(self, batch: StepBatch, token_ids: list[int]) -> None:
        seen = set()
        for row, token_id in zip(batch.outputs.source_rows, token_ids, strict=True):
            if row not in seen:
                self._tokens[row].append(token_id)
            seen.add(row)
        self._outputs.append((batch.step, token_ids))


def work_of(batch: StepBatch | None) -> list[tuple[str, int, int]]:
    """(sequence, start, tokens) of what a step runs."""
    work = [] if batch is None else batch.work
    return [(found.sequence.sequence_id, found.start, found.num_tokens) for found in work]


class SimulatedNode:
    """A scheduler with memory and device under it. Steps run when they begin, and are heard of when they end."""

    def __init__(self, scheduler: Scheduler, memory: SimulatedMemory) -> None:
        self.scheduler = scheduler
        self.memory = memory
        self.device = SimulatedDevice(memory.manager.block_size)
        self.in_flight: deque[tuple[StepBatch, StepResult | StepFailure]] = deque()
        self.unpublished: deque[tuple[StepBatch, StepResult]] = deque()

    def begin(self) -> StepBatch | None:
        """Put a step in flight, if it runs anything."""
        plan = self.scheduler.plan()
        answer = self.ask(plan)
        self.publish()
        batch = self.admit(plan, answer)
        if batch is None:
            self.scheduler.skip(plan)
        else:
            self.execute(batch)
        return batch

    def ask(self, plan: StepPlan) -> MemoryAnswer:
        return self.memory.allocate(plan)

    def admit(self, plan: StepPlan, answer: MemoryAnswer) -> StepBatch | None:
        return self.scheduler.admit(plan, answer)

    def execute(self, batch: StepBatch) -> None:
        self.in_flight.append((batch, self.device.execute(batch)))

    def end(self) -> StepResult | StepFailure:
        """Hear of the oldest step, and take its tokens in."""
        outcome = self.hear()
        self.publish()
        return outcome

    def hear(self) -> StepResult | StepFailure:
        """Hear of the oldest step; its tokens are taken in beside the next one."""
        batch, outcome = self.in_flight.popleft()
        if isinstance(outcome, StepFailure):
            self.scheduler.fail(batch, outcome)
        else:
            self.scheduler.acknowledge(batch)
            self.unpublished.append((batch, outcome))
        return outcome

    def publish(self) -> None:
        """Take the tokens in that were not yet."""
        while self.unpublished:
            self.scheduler.take_outputs(*self.unpublished.popleft())

    def step(self) -> list[tuple[str, int, int]]:
        """Run a step and hear of it."""
        batch = self.begin()
        if batch is not None:
            assert not isinstance(self.end(), StepFailure)
        return work_of(batch)

    def turn(self, steps_in_flight: int) -> None:
        """What the router does next: begin a step if one may, else hear of the oldest."""
        if self.may_begin(steps_in_flight) and self.begin() is not None:
            return
        self.publish()
        if self.in_flight:
            self.hear()

    def may_begin(self, steps_in_flight: int) -> bool:
        """Whether the router would begin a step now."""
        if not self.in_flight:
            return self.scheduler.has_work
        has_room = len(self.in_flight) < steps_in_flight and self.scheduler.may_overlap
        return has_room and self.scheduler.has_work_to_plan

    def run(self, steps_in_flight: int = 1) -> None:
        """Run steps until nobody is left, which must happen."""
        for _ in range(MAX_STEPS):
            if not self.scheduler.has_work and not self.in_flight and not self.unpublished:
                return
            self.turn(steps_in_flight)
        raise AssertionError("somebody waits for ever")
