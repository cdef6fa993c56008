"""Beam search on a block manager: each step the survivors fork from their parents, and the others are released.

Without a model there are no scores. Every survivor draws its parent at random, each as likely as the others: how much is
shared follows from how soon beams meet in a common ancestor, and a real model's scores may make that sooner or later.
The router serves no beams yet. A step after a choice waits for it, so one step is in flight.
"""

from __future__ import annotations

from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np

from bench.length_distributions import MAX_MODEL_LEN, VOCAB_SIZE
from bench.load_sequence import ints
from bench.paged_load import CHECK_EVERY, LOOK_EVERY, MAX_NUM_SEQS
from bench.pool_usage import SESSION, Usage, check_books, measure
from memory_service.demand import Admit, Fork, StepDemand

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from bench.length_distributions import Request
    from memory_service.block_manager import BlockManager


class BeamRequest:
    """A request and its beams, each a row and a line of tokens; all of them have run `[0, computed)`."""

    def __init__(self, request: Request, row: int, number: int) -> None:
        self.rows = [row]
        self.token_ids = request.token_ids[None].copy()
        self.computed = 0
        self.committed = 0
        self._num_prompt_tokens = request.num_prompt_tokens
        self._name = str(number)

    @property
    def is_done(self) -> bool:
        """The last token of the output is nobody's input."""
        return self.computed + 1 == len(self.token_ids[0])

    def admit(self, num_sequences: int) -> Admit:
        """Asks for the prompt's slots."""
        prompt = self.token_ids[0, : self._num_prompt_tokens]
        return Admit(self.rows[0], 1, self._name, self._name, prompt, num_sequences)

    def commit(self, block_size: int) -> NDArray[np.int32]:
        """Tokens of the blocks that became full, beam by beam."""
        begin = self.committed // block_size * block_size
        self.committed = self.computed
        return self.token_ids[:, begin : self.computed // block_size * block_size].ravel()

    def branch(
        self, parents: NDArray[np.int64], token_ids: NDArray[np.int32], free_rows: list[int]
    ) -> tuple[list[Fork], list[int]]:
        """Let beam i go on from beam `parents[i]` with `token_ids[i]`: forks, and rows that nobody goes on from."""
        orphans = dict(enumerate(self.rows))
        forks, rows = [], []
        for parent in parents.tolist():
            row = orphans.pop(parent, None)  # the first child goes on in its parent's row
            if row is None:
                row = free_rows.pop()
                name = f"{self._name}-{row}-{self.computed}"
                forks.append(Fork(self.rows[parent], row, 1, name, self._name, self.computed))
            rows.append(row)
        self.rows = rows
        self.token_ids = self.token_ids[parents]
        self.token_ids[:, self.computed] = token_ids
        return forks, list(orphans.values())


class BeamLoad:
    """A number of requests at once, the next as soon as one ends; the pool must have room for all."""

    def __init__(
        self,
        manager: BlockManager,
        requests: Iterable[Request],
        *,
        beam_width: int,
        seed: int,
        num_at_once: int = 8,
    ) -> None:
        self.manager = manager
        self.usage = Usage()
        self.num_copies = 0
        self.num_tokens = 0  # run as one beam's next
        self._waiting = iter(requests)
        self._beam_width = beam_width
        self._num_at_once = num_at_once
        self._rng = np.random.default_rng(seed)
        self._numbers = count()
        self._live: list[BeamRequest] = []
        self._free_rows = list(range(MAX_NUM_SEQS - 1, -1, -1))

    def run(self) -> BeamLoad:
        """Run all requests to their ends."""
        for step in count(1):
            # One admission a step, so that the token budget takes the longest prompt whole.
            num_unused = self._num_at_once - len(self._live)
            coming = list(islice(self._waiting, min(1, num_unused)))
            if not (self._live or coming):
                break
            self._step(
                step,
                [BeamRequest(one, self._free_rows.pop(), next(self._numbers)) for one in coming],
            )
        check_books(self.manager)
        return self

    def _step(self, step: int, admits: list[BeamRequest]) -> None:
        demand = self._demand(step, admits)
        answer = self.manager.apply(SESSION, demand)
        if answer.refusals:
            raise RuntimeError("the pool is too small: savings would mix with refusals")
        self._free_rows += demand.releases
        self._live = [found for found in self._live if not found.is_done]
        if step % LOOK_EVERY == 0:
            self._look(admits)
        for found in self._live:
            found.computed += 1
        for found, admission in zip(admits, answer.admissions, strict=True):
            found.committed = admission.num_cached_tokens
            found.computed = admission.num_cached_tokens + admission.num_scheduled_tokens
        self._live += admits
        self.num_copies += len(answer.copies)
        self.num_tokens += len(demand.extend_rows)
        if step % CHECK_EVERY == 0:
            check_books(self.manager)

    def _look(self, admits: list[BeamRequest]) -> None:
        ends = {row: found.computed + 1 for found in self._live for row in found.rows}
        ends |= {row: 0 for found in admits for row in found.rows}
        self.usage.add(measure(self.manager, ends))

    def _demand(self, step: int, admits: list[BeamRequest]) -> StepDemand:
        commit_rows = [row for found in self._live for row in found.rows]
        counts = [found.computed for found in self._live for _ in found.rows]
        token_ids = [found.commit(self.manager.block_size) for found in self._live]
        forks: list[Fork] = []
        releases: list[int] = []
        for new_forks, orphans in self._branches():
            forks += new_forks
            releases += orphans
        going_on = [found for found in self._live if not found.is_done]
        rows = [row for found in going_on for row in found.rows]
        return StepDemand(
            step=step,
            acknowledged_step=step - 1,
            commit_rows=ints(commit_rows),
            commit_num_computed_tokens=ints(counts),
            commit_token_ids=np.concatenate([ints(()), *token_ids]),
            releases=tuple(releases),
            forks=tuple(forks),
            extend_rows=ints(rows),
            extend_starts=ints(found.computed for found in going_on for _ in found.rows),
            extend_num_tokens=np.ones(len(rows), dtype=np.int32),
            admits=tuple(found.admit(self._beam_width) for found in admits),
            admit_token_budget=MAX_MODEL_LEN,
        )

    def _branches(self) -> Iterator[tuple[list[Fork], list[int]]]:
        for found in self._live:
            if found.is_done:
                yield [], found.rows
                continue
            parents = self._rng.integers(len(found.rows), size=self._beam_width)
            first = self._rng.integers(VOCAB_SIZE)
            token_ids = (first + np.arange(self._beam_width)) % VOCAB_SIZE  # no two alike
            yield found.branch(parents, token_ids.astype(np.int32), self._free_rows)
