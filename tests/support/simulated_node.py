"""A node without processes: the real block manager, and a device that only remembers which tokens a slot was given."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np
from simulated_requests import next_token

from memory_service import demand
from memory_service.block_hash import BlockHasher
from memory_service.block_manager import BlockManager
from memory_service.record import ReleaseReason
from router.step import Admission, MemoryAnswer, RefusalReason, StepFailure, StepResult

if TYPE_CHECKING:
    from router.request import Sequence
    from router.scheduler import Scheduler
    from router.step import Fork, StepBatch, StepPlan

SESSION = 1
MAX_STEPS = 2000
POISON = 96  # a step that runs this token fails


def ints(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


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
        answer = self.manager.apply(SESSION, _demand(plan))
        return MemoryAnswer(
            step=answer.step,
            admissions={
                found.row: Admission(
                    found.num_cached_tokens, found.num_scheduled_tokens, found.block_table.tolist()
                )
                for found in answer.admissions
            },
            new_blocks=answer.new_blocks,
            forked_tables={row: table.tolist() for row, table in answer.forked_tables},
            copies=answer.copies,
            remaps=answer.remaps,
            refusals={row: RefusalReason(reason.value) for row, reason in answer.refusals},
            num_available_blocks=answer.num_available_blocks,
        )


def _demand(plan: StepPlan) -> demand.StepDemand:
    token_ids = b"".join(found.token_ids for found in plan.commits)
    return demand.StepDemand(
        step=plan.step,
        acknowledged_step=plan.acknowledged_step,
        commit_rows=ints([found.row for found in plan.commits]),
        commit_num_computed_tokens=ints([found.num_computed_tokens for found in plan.commits]),
        commit_token_ids=np.frombuffer(token_ids, dtype="<i4"),
        releases=tuple(found.row for found in plan.releases),
        release_reasons=tuple(ReleaseReason(found.reason.value) for found in plan.releases),
        forks=tuple(_fork(found) for found in plan.forks),
        extend_rows=ints([work.sequence.row for work in plan.extends]),
        extend_starts=ints([work.start for work in plan.extends]),
        extend_num_tokens=ints([work.num_tokens for work in plan.extends]),
        admits=tuple(_admit(found) for found in plan.admits),
        admit_token_budget=plan.admit_token_budget,
        watermark_blocks=plan.watermark_blocks,
    )


def _fork(fork: Fork) -> demand.Fork:
    child = fork.child
    return demand.Fork(
        fork.parent.row, child.row, child.incarnation, child.sequence_id, "", fork.num_tokens
    )


def _admit(sequence: Sequence) -> demand.Admit:
    return demand.Admit(
        sequence.row,
        sequence.incarnation,
        sequence.sequence_id,
        "",
        ints(sequence.token_ids.tolist()),
        sequence.num_sequences,
        sequence.request.tenant,
    )


class SimulatedDevice:
    """Knows rows only by what the steps told; every slot holds the tokens up to its own position."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.slots: dict[int, tuple[int, ...]] = {}
        self._tables: dict[int, list[int]] = {}
        self._tokens: dict[int, list[int]] = {}
        self._outputs: deque[tuple[int, list[int]]] = deque(maxlen=2)
        self._needs_reset = True

    def crash(self) -> None:
        """Forget the rows, keep the slots."""
        self._tables.clear()
        self._tokens.clear()
        self._needs_reset = True

    def execute(self, batch: StepBatch) -> StepResult | StepFailure:
        assert batch.reset or not self._needs_reset
        if batch.reset:
            self.crash()
        self._needs_reset = False
        self._take(batch)
        if any(POISON in work.sequence.token_ids for work in batch.work):
            self.crash()
            return StepFailure(batch.step, "poison")
        for work in batch.work:
            self._run(work.sequence.row, work.start, work.start + work.num_tokens)
        token_ids = [
            next_token(tuple(self._tokens[found.sequence.row]), found.sample_index)
            for found in batch.outputs
        ]
        self._keep(batch, token_ids)
        incarnations = [found.incarnation for found in batch.outputs]
        return StepResult(batch.step, token_ids, incarnations, {}, device_us=0)

    def _take(self, batch: StepBatch) -> None:
        for row in batch.drop_rows:
            self._tables.pop(row, None)
            self._tokens.pop(row, None)
        for new in batch.new_rows:
            self._tables[new.row] = list(new.block_table)
            self._tokens[new.row] = new.token_ids.tolist()
        for fork in batch.forks:
            outputs = dict(self._outputs)[fork.source_step]
            shared = self._tokens[fork.parent.row][: fork.num_tokens]
            self._tables[fork.child.row] = list(fork.child.block_table)
            self._tokens[fork.child.row] = [*shared, outputs[fork.source_output]]
        for row, block_id in batch.appends:
            self._tables[row].append(block_id)
        for row, index, block_id in batch.remaps:
            self._tables[row][index] = block_id
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
        for found, token_id in zip(batch.outputs, token_ids, strict=True):
            if found.sequence.row not in seen:
                self._tokens[found.sequence.row].append(token_id)
            seen.add(found.sequence.row)
        self._outputs.append((batch.step, token_ids))


class SimulatedNode:
    """A scheduler with memory and device under it."""

    def __init__(self, scheduler: Scheduler, memory: SimulatedMemory) -> None:
        self.scheduler = scheduler
        self.memory = memory
        self.device = SimulatedDevice(memory.manager.block_size)

    def step(self) -> list[tuple[str, int, int]]:
        """Run a step; (sequence, start, tokens) of its work."""
        plan = self.scheduler.plan()
        batch = self.scheduler.admit(plan, self.memory.allocate(plan))
        if batch is None:
            self.scheduler.skip(plan)
            return []
        work = [(found.sequence.sequence_id, found.start, found.num_tokens) for found in batch.work]
        outcome = self.device.execute(batch)
        assert not isinstance(outcome, StepFailure)
        self.scheduler.apply(batch, outcome)
        return work

    def run(self) -> None:
        """Run steps until nobody is left, which must happen."""
        for _ in range(MAX_STEPS):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("somebody waits for ever")
