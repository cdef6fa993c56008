"""The paper's baselines: room for a whole request is reserved when it is admitted, in one piece, by a buddy allocator.

Orca (Max), (Pow2) and (Oracle) of the PagedAttention paper, section 6.1, reserve the model's longest sequence; the prompt
and the output's length rounded up to a power of two; exactly prompt and output.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from bench.length_distributions import MAX_MODEL_LEN

if TYPE_CHECKING:
    from collections.abc import Iterable

    from bench.length_distributions import Request


def ceil_log2(value: int) -> int:
    """The least exponent of a power of two that is not below `value`."""
    return (value - 1).bit_length()


class Reservation(Enum):
    """How many slots a request is given."""

    MAX = "Orca (Max)"
    POW2 = "Orca (Pow2)"
    ORACLE = "Orca (Oracle)"

    def num_slots(self, request: Request) -> int:
        """Slots that `request` asks for."""
        num_output = request.num_output_tokens
        if self is Reservation.MAX:
            return MAX_MODEL_LEN
        if self is Reservation.POW2:
            num_output = 1 << ceil_log2(num_output)
        return min(MAX_MODEL_LEN, request.num_prompt_tokens + num_output)


class BuddyAllocator:
    """Pieces whose sizes are powers of two, split when they are too large, merged with their other halves when free."""

    def __init__(self, num_slots: int) -> None:
        self._free: list[set[int]] = [set() for _ in range(num_slots.bit_length())]
        begin = 0
        for order in reversed(range(num_slots.bit_length())):
            if num_slots >> order & 1:
                self._free[order].add(begin)
                begin += 1 << order

    def allocate(self, order: int) -> int | None:
        """Where a piece of `2 ** order` slots begins; None when there is none."""
        fitting = [found for found in range(order, len(self._free)) if self._free[found]]
        if not fitting:
            return None
        begin = min(self._free[fitting[0]])
        self._free[fitting[0]].remove(begin)
        for half in reversed(range(order, fitting[0])):
            self._free[half].add(begin + (1 << half))
        return begin

    def free(self, begin: int, order: int) -> None:
        """Give a piece back."""
        while begin ^ (1 << order) in self._free[order]:
            self._free[order].remove(begin ^ (1 << order))
            begin &= ~(1 << order)
            order += 1
        self._free[order].add(begin)

    @property
    def num_free_slots(self) -> int:
        """Slots of all free pieces."""
        return sum(len(begins) << order for order, begins in enumerate(self._free))


@dataclass(slots=True)
class ContiguousUsage:
    """Sums over the steps in which a request waited."""

    num_slots: int
    num_steps: int = 0
    num_sequence_steps: int = 0
    num_token_steps: int = 0
    num_ends: int = 0

    @property
    def pool_share(self) -> float:
        """Of all slots, those with tokens."""
        return self.num_token_steps / (self.num_steps * self.num_slots)

    @property
    def sequences_at_once(self) -> float:
        """Mean over the steps."""
        return self.num_sequence_steps / self.num_steps

    @property
    def ends_per_step(self) -> float:
        """Throughput, in requests."""
        return self.num_ends / self.num_steps


class ContiguousLoad:
    """Requests in order of arrival, one token a step each, without anything that could preempt them."""

    def __init__(self, num_slots: int, reservation: Reservation) -> None:
        self._allocator = BuddyAllocator(num_slots)
        self._reservation = reservation
        self._running: list[tuple[int, int, int, int]] = []  # (end, tokens at step 0, piece, order)
        self.usage = ContiguousUsage(num_slots)

    def run(self, requests: Iterable[Request]) -> ContiguousUsage:
        """Admit all requests as soon as they fit, and stop when the last one is in."""
        step = 0
        for number, request in enumerate(waiting := list(requests)):
            while not self._admit(request, step):
                self._advance(step, is_steady=number >= len(waiting) // 5)
                step += 1
        return self.usage

    def _admit(self, request: Request, step: int) -> bool:
        order = ceil_log2(self._reservation.num_slots(request))
        begin = self._allocator.allocate(order)
        if begin is None:
            return False
        # The step that runs the prompt samples the first token; the last one is never run.
        end = step + request.num_output_tokens
        at_zero = request.num_prompt_tokens - step
        heapq.heappush(self._running, (end, at_zero, begin, order))
        return True

    def _advance(self, step: int, *, is_steady: bool) -> None:
        """Run a step: all that run hold what they had, and one token more when it ends."""
        if is_steady:
            self.usage.num_steps += 1
            self.usage.num_sequence_steps += len(self._running)
            self.usage.num_token_steps += sum(at_zero + step for _, at_zero, _, _ in self._running)
        while self._running and self._running[0][0] <= step + 1:
            _, _, begin, order = heapq.heappop(self._running)
            self._allocator.free(begin, order)
            self.usage.num_ends += is_steady
