"""Load on a block manager, as the router puts it there, without a model: outputs are known beforehand."""

from __future__ import annotations

import heapq
from collections import deque
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from bench.load_sequence import Sequence, Step, ints
from bench.pool_usage import SESSION, Usage, check_books, measure
from memory_service.block_hash import BlockHasher
from memory_service.block_manager import BlockManager
from memory_service.demand import StepDemand

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bench.length_distributions import Request
    from memory_service.demand import StepAnswer

MAX_NUM_SEQS = 1024
MAX_ADMITS_PER_STEP = 16
WATERMARK = 0.01  # share of the pool, the router's default
STEPS_IN_FLIGHT = 2
CHECK_EVERY = 2_000  # steps; a check walks over the pool and all tables
LOOK_EVERY = 3  # steps; no divisor of any block size, so that no phase is favoured


def new_manager(num_slots: int, block_size: int, min_partial_tokens: int = 0) -> BlockManager:
    """A manager of `num_slots` slots beside the null block, with a session open."""
    hasher = BlockHasher(b"secret", b"root")
    manager = BlockManager(
        num_slots // block_size + 1, block_size, hasher, min_partial_tokens=min_partial_tokens
    )
    manager.open_session(SESSION, MAX_NUM_SEQS)
    return manager


class PagedLoad:
    """Requests wait in order of arrival, run, are preempted when blocks lack, and end."""

    def __init__(
        self,
        manager: BlockManager,
        requests: Iterable[Request],
        *,
        steps_in_flight: int = STEPS_IN_FLIGHT,
        watermark: float = WATERMARK,
    ) -> None:
        self.manager = manager
        self.usage = Usage()  # of steady steps
        self.num_steady_steps = 0
        self.num_steady_ends = 0  # of sequences, in those steps
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self.num_tokens = 0  # run to their ends, each once
        self.num_prompt_tokens = 0
        self.num_hit_tokens = 0
        self._numbers = count(1)
        self._order = count()
        self._waiting: list[tuple[int, int, Sequence]] = []
        for arrival, request in enumerate(requests):
            if request.num_blocks(manager.block_size) >= manager.pool.num_blocks:
                raise ValueError(f"a request of {len(request.token_ids)} tokens never fits")
            known, is_alone = request.num_prompt_tokens, request.num_samples == 1
            self._wait(Sequence(request, arrival, request.token_ids, known, is_alone))
        self._num_requests = len(self._waiting)
        self.num_sequences = sum(found.num_sequences for *_, found in self._waiting)
        self._running: dict[int, Sequence] = {}
        self._free_rows = list(range(MAX_NUM_SEQS - 1, -1, -1))
        self._releases: list[int] = []
        self._commits: list[Sequence] = []
        self._steps_in_flight = steps_in_flight
        self._watermark_blocks = int(watermark * manager.pool.num_blocks)
        self._in_flight: deque[int] = deque()
        self._acknowledged = 0

    @property
    def is_steady(self) -> bool:
        """A request waits, and a fifth of them do not any more."""
        return 0 < len(self._waiting) <= self._num_requests * 4 // 5

    @property
    def ends_per_step(self) -> float:
        """Throughput, in requests."""
        num_samples = self.num_sequences / self._num_requests
        return self.num_steady_ends / num_samples / self.num_steady_steps

    @property
    def recomputed_share(self) -> float:
        """Tokens run again after a preemption, beside those of all requests."""
        return self.num_recomputed_tokens / self.num_tokens

    @property
    def preemptions_per_request(self) -> float:
        """Of sequences, the way to the end included."""
        return self.num_preemptions / self._num_requests

    def run(self) -> PagedLoad:
        """Run all requests to their ends."""
        while self._waiting or self._running or self._releases:
            self.step()
        check_books(self.manager)
        return self

    def step(self) -> None:
        """Ask memory for one step; the oldest one in flight ends."""
        step = self._plan(next(self._numbers))
        self._take(step, self.manager.apply(SESSION, self._demand(step)))
        self._look(step.number)
        self._in_flight.append(step.number)
        if len(self._in_flight) == self._steps_in_flight:
            self._acknowledge(self._in_flight.popleft())

    def ends(self) -> dict[int, int]:
        """By row that memory knows, the end of its tokens in flight."""
        live = {row: found.start for row, found in self._running.items()}
        return live | dict.fromkeys(self._releases, 0)

    def _look(self, number: int) -> None:
        self.num_steady_steps += self.is_steady
        if self.is_steady and number % LOOK_EVERY == 0:
            self.usage.add(measure(self.manager, self.ends()))
        if number % CHECK_EVERY == 0:
            check_books(self.manager)

    def _wait(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.arrival, next(self._order), sequence))

    # Plan

    def _plan(self, number: int) -> Step:
        step = Step(number, list(self._plan_forks()))
        for sequence in sorted(self._running.values(), key=lambda found: found.arrival):
            num_tokens = min(sequence.num_tokens_to_run, step.budget)
            if num_tokens > 0:
                step.work.append((sequence, num_tokens))
                step.budget -= num_tokens
        self._plan_admits(step)
        return step

    def _plan_forks(self) -> Iterator[tuple[Sequence, Sequence]]:
        """Siblings of the prompts that have run to their ends, acknowledged or not."""
        for parent in list(self._running.values()):
            if parent.has_forked or parent.start < parent.request.num_prompt_tokens:
                continue
            parent.has_forked = True
            for sample_index in range(1, parent.request.num_samples):
                child = parent.fork(sample_index)
                self._give_row(child)
                self._running[child.row] = child
                yield parent, child

    def _plan_admits(self, step: Step) -> None:
        num_rows = len(self._free_rows)
        num_rows -= sum(found.num_sequences - 1 for found in self._running.values())
        while self._waiting and step.budget > 0 and len(step.admits) < MAX_ADMITS_PER_STEP:
            num_rows -= self._waiting[0][2].num_sequences
            if num_rows < 0:
                break
            sequence = heapq.heappop(self._waiting)[2]
            self._give_row(sequence)
            step.admits.append(sequence)

    def _give_row(self, sequence: Sequence) -> None:
        sequence.row = self._free_rows.pop()
        sequence.incarnation += 1

    # Ask

    def _demand(self, step: Step) -> StepDemand:
        commits, releases, size = self._commits, tuple(self._releases), self.manager.block_size
        self._commits, self._releases = [], []
        self._free_rows += releases
        return StepDemand(
            step=step.number,
            acknowledged_step=self._acknowledged,
            commit_rows=ints(found.row for found in commits),
            commit_num_computed_tokens=ints(found.computed for found in commits),
            commit_token_ids=np.concatenate([ints(()), *(found.commit(size) for found in commits)]),
            releases=releases,
            forks=tuple(child.forked_from(parent) for parent, child in step.forks),
            extend_rows=ints(found.row for found, _ in step.work),
            extend_starts=ints(found.start for found, _ in step.work),
            extend_num_tokens=ints(num_tokens for _, num_tokens in step.work),
            admits=tuple(found.admit() for found in step.admits),
            admit_token_budget=step.budget,
            watermark_blocks=self._watermark_blocks,
        )

    # Take

    def _take(self, step: Step, answer: StepAnswer) -> None:
        refused = {row for row, _ in answer.refusals}
        cached = {found.row: found for found in answer.admissions}
        for sequence, num_tokens in step.work:
            if sequence.row not in refused:
                sequence.run(step.number, num_tokens)
        for sequence in step.admits:
            if sequence.row in refused:
                self._free_rows.append(sequence.row)
                self._wait(sequence)
                continue
            found = cached[sequence.row]
            self._count(sequence, found.num_cached_tokens)
            sequence.begin(found.num_cached_tokens)
            sequence.run(step.number, found.num_scheduled_tokens)
            self._running[sequence.row] = sequence
        self._preempt_for([found for found, _ in step.work if found.row in refused])

    def _count(self, sequence: Sequence, num_cached_tokens: int) -> None:
        if sequence.computed:  # preempted before
            self.num_recomputed_tokens += max(0, sequence.computed - num_cached_tokens)
        else:
            self.num_prompt_tokens += sequence.request.num_prompt_tokens
            self.num_hit_tokens += num_cached_tokens

    def _preempt_for(self, refused: list[Sequence]) -> None:
        """Make room for the next step: who has computed least goes first, as in `router.preemption`."""
        num_blocks = self.manager.table(SESSION).num_blocks
        missing = len(refused)
        candidates = sorted(
            self._running.values(), key=lambda found: (-found.computed, found.arrival)
        )
        while missing > 0 and len(candidates) > 1:
            victim = candidates.pop()
            missing -= int(num_blocks[victim.row]) + (victim in refused)
            self.num_preemptions += 1
            victim.preempt()
            self._leave(victim)
            self._wait(victim)

    def _leave(self, sequence: Sequence) -> None:
        del self._running[sequence.row]
        self._releases.append(sequence.row)

    def _acknowledge(self, step: int) -> None:
        self._acknowledged = step
        for sequence in list(self._running.values()):
            if sequence.acknowledge(step):
                self._commits.append(sequence)
            if sequence.computed == sequence.end and sequence.has_forked:
                self._leave(sequence)
                self.num_steady_ends += self.is_steady
                self.num_tokens += sequence.end
