"""What happened to requests and steps, in plain numbers; `router.metrics` shows them.

Nothing is looked up or locked, and the tokens of a step are counted together: one clock reading serves all of them.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from quire.distribution import REQUEST_BOUNDS_S, STEP_BOUNDS_S, TOKEN_GAP_BOUNDS_S, Distribution
from quire.errors import ErrorReason
from router.request import FinishReason
from router.step import StepFailure

if TYPE_CHECKING:
    from collections.abc import Callable

    from router.request import Request, Sequence
    from router.step import StepResult

# What a request can be rejected for; told as zero until it happens.
_REJECTIONS: Final = (
    ErrorReason.INVALID_REQUEST,
    ErrorReason.CONTEXT_LENGTH_EXCEEDED,
    ErrorReason.POOL_TOO_SMALL,
    ErrorReason.REQUEST_ID_IN_USE,
    ErrorReason.QUEUE_FULL,
    ErrorReason.NOT_READY,
    ErrorReason.UNAUTHENTICATED,
)
_STAGES: Final = ("plan", "memory", "device", "compute_wait", "publish")


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds that a step took, as the router saw it."""

    plan: float  # the scheduler's, before and after memory's answer
    memory: float  # until memory answered
    compute: float  # until compute answered, the device's time included
    publish: float  # tokens to text to the clients' streams


class Tally:
    """Counts since the process began.

    A request is accepted once and finished once: accepted = finished + live, at any moment. All of it is called from the
    router's one loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_accepted = 0
        self.num_rejected: Counter[ErrorReason] = Counter(dict.fromkeys(_REJECTIONS, 0))
        self.num_finished = dict.fromkeys(FinishReason, 0)
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_prompt_tokens = 0
        self.num_output_tokens = 0
        self.num_steps = 0
        self.num_step_failures = 0
        self.num_reconnects = 0
        self.time_to_first_token = Distribution(REQUEST_BOUNDS_S)
        self.inter_token_latency = Distribution(TOKEN_GAP_BOUNDS_S)
        self.end_to_end = Distribution(REQUEST_BOUNDS_S)
        self.queue_time = Distribution(REQUEST_BOUNDS_S)
        self.step_stages = {stage: Distribution(STEP_BOUNDS_S) for stage in _STAGES}
        self.now = clock  # seconds

    # Requests

    def accepted(self, request: Request, received_at: float) -> None:
        """`request`, received at `received_at`, waits for its turn."""
        request.received_at = received_at
        self.num_accepted += 1

    def rejected(self, reason: ErrorReason) -> None:
        """A request was refused before it waited."""
        self.num_rejected[reason] += 1

    def admitted(self, request: Request) -> None:
        """Memory admitted `request` for the first time."""
        self.num_prompt_tokens += len(request.prompt_token_ids)
        self.num_cached_prompt_tokens += request.num_cached_tokens
        request.admitted_at = self.now()
        self.queue_time.observe(request.admitted_at - request.received_at)

    def preempted(self) -> None:
        """A running sequence lost its row."""
        self.num_preemptions += 1

    def finished(self, request: Request) -> None:
        """Every sample of `request` has ended."""
        assert request.finish_reason is not None
        self.num_finished[request.finish_reason] += 1
        request.finished_at = self.now()
        self.end_to_end.observe(request.finished_at - request.received_at)

    # Tokens

    def tokens(self, sequences: list[Sequence], arrived_at: float) -> None:
        """Each of `sequences` got one more output token from a step, which were taken in from `arrived_at` on."""
        # Most had one in the step before: their gaps are one number.
        num_by_last = Counter([sequence.last_token_at for sequence in sequences])
        for last_at, count in num_by_last.items():
            self.num_output_tokens += count
            if last_at:
                self.inter_token_latency.observe(arrived_at - last_at, count)
            else:
                self._first_tokens(sequences, arrived_at)
        for sequence in sequences:
            sequence.last_token_at = arrived_at

    def _first_tokens(self, sequences: list[Sequence], arrived_at: float) -> None:
        for request in (sequence.request for sequence in sequences):
            if not request.first_token_at:
                request.first_token_at = arrived_at
                self.time_to_first_token.observe(arrived_at - request.received_at)

    # Steps

    def step_ended(self, times: StepTimes, outcome: StepResult | StepFailure) -> None:
        """Compute answered a step, and what it answered was taken in."""
        self.num_steps += 1
        if isinstance(outcome, StepFailure):
            self.num_step_failures += 1
            return
        device = outcome.device_us * 1e-6
        stages = self.step_stages
        stages["plan"].observe(times.plan)
        stages["memory"].observe(times.memory)
        stages["device"].observe(device)
        stages["compute_wait"].observe(max(0.0, times.compute - device))
        stages["publish"].observe(times.publish)

    def reconnected(self) -> None:
        """Both streams stand again after one was lost."""
        self.num_reconnects += 1
