"""A request and its sequences: the router's central nouns."""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.errors import QuireError
    from router.sampling_params import SamplingParams, StoppingCriteria
    from router.step import TokenLogprobs
    from router.stop_strings import StopMatch
    from router.text_output import TextOutput

NO_ROW = -1

if sys.byteorder != "little":
    message = "token ids travel as little-endian int32; this machine is big-endian"
    raise ImportError(message)


class FinishReason(IntEnum):
    """Why a sample ended, the gravest last: a request ended for the gravest reason among its samples."""

    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 4


class SequenceState(Enum):
    """Where a sequence is."""

    WAITING = 1  # holds no row
    RUNNING = 2  # holds a row and blocks
    FINISHED = 3


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of one sample."""

    sample_index: int
    reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    matched: str | int | None = None  # the stop string or stop token that ended it


class Sink(Protocol):
    """Where the events of a request go."""

    def output(self, sample_index: int, output: TextOutput) -> None:
        """There is output of one sample to take from `output`; not told again before it was taken, but at the end."""

    def finished(self, finish: Finish) -> None:
        """The end of one sample."""

    def failed(self, error: QuireError) -> None:
        """The end of the request by an error."""


@dataclass(slots=True, eq=False)
class Request:
    """What a client asked for, with all defaults filled in."""

    request_id: str
    prompt_token_ids: array[int]  # type "i"
    sampling: SamplingParams
    stopping: StoppingCriteria
    seed: int
    max_tokens: int
    end_token_ids: frozenset[int]  # the model's own (unless ignored) and the request's
    eos_token_ids: frozenset[int]  # among them, the model's own
    priority: int
    sink: Sink
    new_output: Callable[[array[int]], TextOutput]  # of the tokens of a sequence, which grow
    tenant: str = ""  # whose it is, from the call's credentials; empty: of all who have none
    error: QuireError | None = None  # what ended it, if one did
    arrival: int = 0  # number given by the scheduler; order among equals
    num_cached_tokens: int = -1  # -1: never admitted
    sequences: dict[int, Sequence] = field(default_factory=dict)  # by sample index
    num_finished: int = 0
    finish_reason: FinishReason | None = None  # the gravest among the samples that ended
    # Seconds of the router's clock; 0: not yet.
    received_at: float = 0.0
    admitted_at: float = 0.0  # for the first time
    first_token_at: float = 0.0
    finished_at: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from all live requests: ids are chosen by clients, and unique only within a tenant."""
        return self.tenant, self.request_id

    @property
    def num_samples(self) -> int:
        """Samples asked for."""
        return self.sampling.num_samples

    @property
    def is_finished(self) -> bool:
        """True when every sample has ended."""
        return self.num_finished == self.num_samples

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, of all samples."""
        return sum(sequence.num_output_tokens for sequence in self.sequences.values())

    @property
    def suppressed_token_ids(self) -> tuple[int, ...]:
        """Tokens that cannot be sampled before min_tokens."""
        return tuple(sorted(self.end_token_ids)) if self.stopping.min_tokens else ()

    def fail(self, error: QuireError) -> None:
        """Tell the sink that the request ends by `error`; its samples are still to be finished."""
        self.error = error
        self.sink.failed(error)

    def finish_sample(
        self, sample_index: int, reason: FinishReason, *, matched: str | int | None = None
    ) -> None:
        """Tell the sink that a sample ended; it may not have begun."""
        self.num_finished += 1
        self.finish_reason = max(reason, self.finish_reason or reason)
        sequence = self.sequences.get(sample_index)
        self.sink.finished(
            Finish(
                sample_index,
                reason,
                num_prompt_tokens=len(self.prompt_token_ids),
                num_output_tokens=sequence.num_output_tokens if sequence else 0,
                num_cached_tokens=max(0, self.num_cached_tokens),
                matched=matched,
            )
        )


@dataclass(slots=True, eq=False)
class Sequence:
    """One token stream.

    `[0, num_computed_tokens)` has keys and values that compute acknowledged; the next `num_in_flight_tokens` are in steps
    not yet acknowledged. `token_ids` is what is known; the tokens behind it, up to `pending_end`, are being sampled on
    the device.
    """

    request: Request
    sample_index: int
    token_ids: array[int]  # type "i": prompt, then output
    output: TextOutput
    state: SequenceState = SequenceState.WAITING
    row: int = NO_ROW
    incarnation: int = 0  # rises with every admission
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    pending_end: int = 0  # of the tokens that steps in flight sample; 0: none does
    pending_step: int = 0  # samples the last of them
    pending_output: int = 0  # of that step
    num_committed_tokens: int = 0  # of the computed, those that memory was told of
    block_table: list[int] = field(default_factory=list)
    has_forked: bool = False  # the prompt is sampled, or was: the siblings, if any, exist
    last_token_at: float = 0.0  # seconds of the router's clock; 0: no output yet
    num_prompt_tokens: int = field(init=False)
    max_inputs: int = field(init=False)  # tokens that are ever run: the last one is nobody's input
    end_token_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        # Asked for at every token.
        self.end_token_ids = self.request.end_token_ids
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        self.max_inputs = self.num_prompt_tokens + self.request.max_tokens - 1

    @property
    def sequence_id(self) -> str:
        """Id for people, unique among live sequences: behind the last slash no two tenants look the same."""
        tenant = self.request.tenant
        owner = f"@{quote(tenant, safe='')}" if tenant else ""
        return f"{self.request.request_id}/{self.sample_index}{owner}"

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens known and pending."""
        return max(len(self.token_ids), self.pending_end)

    @property
    def next_position(self) -> int:
        """First position that the next step runs."""
        return self.num_computed_tokens + self.num_in_flight_tokens

    def tokens_to_run(self) -> tuple[int, int]:
        """Where the next step begins, and the one scheduling rule: (known + pending) - (computed + in flight)."""
        # Without min and max: asked for every sequence in every step.
        end = len(self.token_ids)
        if self.pending_end > end:  # noqa: PLR1730 -- see above
            end = self.pending_end
        if end > self.max_inputs:  # noqa: PLR1730 -- see above
            end = self.max_inputs
        start = self.num_computed_tokens + self.num_in_flight_tokens
        return start, end - start

    @property
    def num_sequences(self) -> int:
        """Rows that this sequence will need: its own, and those of siblings that are not forked yet."""
        return 1 if self.has_forked else self.request.num_samples

    @property
    def missing_samples(self) -> list[int]:
        """Samples that are drawn, beside its own, where its prompt ends: siblings that do not exist yet."""
        if self.has_forked:
            return []
        samples = range(self.request.num_samples)
        return [index for index in samples if index not in self.request.sequences]

    @property
    def urgency(self) -> tuple[int, int, int]:
        """Sorts the most urgent first."""
        return (self.request.priority, self.request.arrival, self.sample_index)

    def goes_on_at(self, position: int, incarnation: int) -> bool:
        """Whether the token that a step sampled for `position` is the next one.

        Not of a sequence that ended a step ago, for instance by a stop string. One that was preempted meanwhile takes
        it: the token is the same in any admission. Not once it was admitted again: compute has a row of it without the
        token.
        """
        if position != len(self.token_ids):
            return False
        if incarnation == self.incarnation:
            return self.state is not SequenceState.FINISHED
        return self.state is SequenceState.WAITING

    def append(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Add a sampled token; it may end the sequence. The sink is told, unless it was and has not taken since."""
        output = self.output
        self.token_ids.append(token_id)
        if logprobs is not None:
            output.add_logprobs(logprobs)
        if token_id in self.end_token_ids:
            output.hide_last()
            self._end(
                FinishReason.STOP, None if token_id in self.request.eos_token_ids else token_id
            )
        elif output.is_searched and (match := self._search()) is not None:
            self._tell()
            self.finish(FinishReason.STOP, matched=match.stop_string)
        elif len(self.token_ids) > self.max_inputs:
            self._end(FinishReason.LENGTH)
        elif not output.is_told:
            self._tell()

    def _search(self) -> StopMatch | None:
        return self.output.search(
            may_stop=self.num_output_tokens >= self.request.stopping.min_tokens
        )

    def _tell(self) -> None:
        self.output.is_told = True
        self.request.sink.output(self.sample_index, self.output)

    def _end(self, reason: FinishReason, matched: int | None = None) -> None:
        """With all output that is there; a stop string cuts it off instead."""
        self.output.finish()
        self._tell()
        self.finish(reason, matched=matched)

    def cut_off(self, reason: FinishReason) -> None:
        """End the sequence from outside, with all its output so far."""
        self._end(reason)

    def finish(self, reason: FinishReason, *, matched: str | int | None = None) -> None:
        """End the sequence and tell the sink."""
        self.state = SequenceState.FINISHED
        self.request.finish_sample(self.sample_index, reason, matched=matched)

    def fork(self, sample_index: int) -> Sequence:
        """The sibling `sample_index`, sharing the prompt, which a step in flight computes to its end."""
        child = _new_sequence(self.request, sample_index)
        child.num_computed_tokens, child.has_forked = self.num_prompt_tokens, True
        return child

    def begin(self, block_table: list[int], num_cached_tokens: int) -> bool:
        """Memory admitted the sequence and found its first tokens in the prefix cache; whether its request begins so."""
        self.block_table = block_table
        self.num_computed_tokens = self.num_committed_tokens = num_cached_tokens
        is_first = self.request.num_cached_tokens < 0
        if is_first:
            self.request.num_cached_tokens = num_cached_tokens
        return is_first

    def roll_back(self) -> None:
        """Forget steps that were not acknowledged."""
        self.num_in_flight_tokens = 0
        self.pending_end = 0

    def lose_row(self) -> None:
        """Forget row and blocks: the sequence was preempted."""
        self.state = SequenceState.WAITING
        self.row = NO_ROW
        self.num_computed_tokens = 0
        self.num_committed_tokens = 0
        self.roll_back()
        self.block_table = []


def first_sequence(request: Request) -> Sequence:
    """The sequence that computes the prompt; siblings are forked from it."""
    return _new_sequence(request, 0)


def _new_sequence(request: Request, sample_index: int) -> Sequence:
    token_ids = array("i", request.prompt_token_ids)
    sequence = Sequence(request, sample_index, token_ids, request.new_output(token_ids))
    request.sequences[sample_index] = sequence
    return sequence
