"""What happened to requests and steps, in plain numbers; `router.metrics` shows them.

Every token passes through here, so nothing is looked up or locked: one clock reading serves all tokens of a step.
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
        self._outputs_at = 0.0
        self._last_outputs_at = 0.0  # of the tokens that `num_output_tokens` does not count yet
        self._num_tokens = 0  # they

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

    def outputs_arrived(self) -> None:
        """The tokens that are counted next were sampled by one step."""
        self._outputs_at = self.now()

    def token(self, sequence: Sequence) -> None:
        """`sequence` gets one more output token."""
        last = sequence.last_token_at
        sequence.last_token_at = self._outputs_at
        # Most of them had one in the step before: their gaps are one number.
        if last != self._last_outputs_at:
            self._count_tokens()
            self._last_outputs_at = last
        self._num_tokens += 1
        if not last and not sequence.request.first_token_at:
            self._first_token(sequence.request)

    def _first_token(self, request: Request) -> None:
        request.first_token_at = self._outputs_at
        self.time_to_first_token.observe(self._outputs_at - request.received_at)

    def outputs_taken(self) -> None:
        """All tokens of the step were counted."""
        self._count_tokens()

    def _count_tokens(self) -> None:
        """Tokens of sequences that had their last one at the same time, or had none."""
        count, self._num_tokens = self._num_tokens, 0
        if count:
            self.num_output_tokens += count
            if self._last_outputs_at:
                self.inter_token_latency.observe(self._outputs_at - self._last_outputs_at, count)

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
