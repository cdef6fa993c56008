"""The nouns of one step: what is planned, what memory answers, what compute runs and returns.

They mirror the messages of the two streams; `router.clients` converts. Those that every row has in every step are named
tuples, which are made in a third of the time of a frozen dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from router.request import Sequence


class RefusalReason(Enum):
    """Why memory did not meet a demand."""

    NO_BLOCKS = 1
    PREFIX_IN_PROGRESS = 2
    TOKEN_BUDGET = 3
    OVER_QUOTA = 4  # of the tenant; waiting, or the end of another sequence of the tenant, helps
    LARGER_THAN_QUOTA = 5  # the sequence alone: waiting does not help


class ReleaseReason(Enum):
    """Why a row is given up."""

    FINISHED = 1
    PREEMPTED = 2
    CANCELLED = 3
    FAILED = 4
    RESUMED = 5  # the session resumed: the sequence comes in again from what is cached


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one sampled token."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # most likely tokens with theirs, most likely first


class Commit(NamedTuple):
    """Acknowledged progress of a row."""

    row: int
    num_computed_tokens: int
    token_ids: bytes  # of the blocks that became full: little-endian int32


class Release(NamedTuple):
    """A row that is given up."""

    row: int
    reason: ReleaseReason


@dataclass(frozen=True, slots=True)
class Fork:
    """`child` continues `parent` from output `source_output` of step `source_step`."""

    parent: Sequence
    parent_row: int  # in that step, and until the fork is made, whatever becomes of the parent
    parent_incarnation: int
    child: Sequence
    num_tokens: int  # tokens shared
    source_step: int
    source_output: int


class Work(NamedTuple):
    """Tokens `[start, start + num_tokens)` of a sequence, to be run in one step."""

    sequence: Sequence
    incarnation: int
    start: int
    num_tokens: int


@dataclass(slots=True)
class StepPlan:
    """What a step asks of memory."""

    step: int
    acknowledged_step: int = 0
    commits: list[Commit] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    extends: list[Work] = field(default_factory=list)
    admits: list[Sequence] = field(default_factory=list)
    admit_token_budget: int = 0
    watermark_blocks: int = 0

    @property
    def is_empty(self) -> bool:
        """True when memory need not be asked."""
        return not (self.commits or self.releases or self.forks or self.extends or self.admits)


@dataclass(frozen=True, slots=True)
class Admission:
    """An admitted row."""

    num_cached_tokens: int  # may end within a block: that one is new, and a copy brings its content
    num_scheduled_tokens: int
    block_table: list[int]


@dataclass(slots=True)
class MemoryAnswer:
    """What memory gave and refused, by row."""

    step: int
    admissions: dict[int, Admission]
    new_blocks: list[tuple[int, int]]  # (row, block), in table order
    forked_tables: dict[int, list[int]]
    copies: list[tuple[int, int]]  # (src, dst)
    remaps: list[tuple[int, int, int]]  # (row, index, block)
    refusals: dict[int, RefusalReason]
    num_available_blocks: int


class Output(NamedTuple):
    """The last position of `source` in a step is sampled; `sequence`, itself or a sibling, gets the token."""

    source: Sequence
    sequence: Sequence
    incarnation: int  # of `sequence` once it runs on with the token
    position: int  # of the token


@dataclass(slots=True)
class StepBatch:
    """What a step asks of compute."""

    step: int
    work: list[Work]
    reset: bool = False
    drop_rows: list[int] = field(default_factory=list)
    new_rows: list[Sequence] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    appends: list[tuple[int, int]] = field(default_factory=list)  # (row, block)
    remaps: list[tuple[int, int, int]] = field(default_factory=list)  # (row, index, block)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (src, dst)
    pending: list[tuple[int, int, int]] = field(default_factory=list)  # (row, step, output)
    outputs: list[Output] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step that compute ran."""

    step: int
    token_ids: list[int]
    incarnations: list[int]
    logprobs: dict[int, TokenLogprobs]  # by index of the output
    device_us: int


@dataclass(frozen=True, slots=True)
class StepFailure:
    """A step that compute did not run to its end."""

    step: int
    message: str
