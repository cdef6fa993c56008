"""A sequence of a load and what a step does with it, without a model: its output is known beforehand."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from memory_service.demand import Admit, Fork

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from bench.length_distributions import Request

TOKEN_BUDGET = 2048  # of a step


def ints(values: Iterable[int]) -> NDArray[np.int32]:
    """An array of a demand."""
    return np.fromiter(values, dtype=np.int32)


@dataclass(slots=True, eq=False)
class Sequence:
    """A token stream: `[0, computed)` is acknowledged, what follows up to `start` is in flight."""

    request: Request
    arrival: int
    token_ids: NDArray[np.int32]
    num_known: int  # tokens known when it is admitted: the prompt, or what a preemption left
    has_forked: bool  # its siblings, if any, exist
    row: int = -1
    incarnation: int = 0
    computed: int = 0
    start: int = 0  # first position that the next step runs
    committed: int = 0
    in_flight: deque[tuple[int, int]] = field(default_factory=deque)  # (step, tokens)

    @property
    def end(self) -> int:
        """Positions that are ever run: the last token of the output is nobody's input."""
        return len(self.token_ids) - 1

    @property
    def num_tokens_to_run(self) -> int:
        """What is known and not in flight, or the one token that is being sampled, or nothing before the end."""
        return max(self.num_known - self.start, int(self.start < self.end))

    @property
    def num_sequences(self) -> int:
        """Rows that it will need."""
        return 1 if self.has_forked else self.request.num_samples

    def run(self, step: int, num_tokens: int) -> None:
        """The step runs the next tokens."""
        self.in_flight.append((step, num_tokens))
        self.start += num_tokens

    def acknowledge(self, step: int) -> bool:
        """The step ended; whether it ran a token of this sequence."""
        if not self.in_flight or self.in_flight[0][0] != step:
            return False
        self.computed += self.in_flight.popleft()[1]
        return True

    def begin(self, num_cached_tokens: int) -> None:
        """Memory admitted it."""
        self.computed = self.committed = self.start = num_cached_tokens

    def fork(self, sample_index: int) -> Sequence:
        """A sibling that shares all that is computed or in flight."""
        token_ids = self.request.sample(sample_index)
        child = Sequence(self.request, self.arrival, token_ids, self.num_known, has_forked=True)
        # What is computed is committed by the time the fork is applied.
        child.computed, child.start, child.committed = self.computed, self.start, self.computed
        child.in_flight = self.in_flight.copy()
        return child

    def forked_from(self, parent: Sequence) -> Fork:
        """Asks for this sibling's table."""
        name, request = f"{self.arrival}-{self.row}", f"{self.arrival}"
        return Fork(parent.row, self.row, self.incarnation, name, request, self.start)

    def admit(self) -> Admit:
        """Asks for room for all known tokens."""
        name, known = f"{self.arrival}", self.token_ids[: self.num_known]
        return Admit(self.row, self.incarnation, name, name, known, self.num_sequences)

    def commit(self, block_size: int) -> NDArray[np.int32]:
        """Tokens of the blocks that became full."""
        begin = self.committed // block_size * block_size
        self.committed = self.computed
        return self.token_ids[begin : self.computed // block_size * block_size]

    def preempt(self) -> None:
        """Forget the blocks, keep the tokens."""
        self.num_known = max(self.num_known, self.computed + 1)
        self.in_flight.clear()


@dataclass(slots=True)
class Step:
    """What one step asks of memory."""

    number: int
    forks: list[tuple[Sequence, Sequence]]
    work: list[tuple[Sequence, int]] = field(default_factory=list)  # with tokens to run
    admits: list[Sequence] = field(default_factory=list)
    budget: int = TOKEN_BUDGET
