"""The nouns of one step: what is planned, what memory answers, what compute runs and returns.

They mirror the messages of the two streams; `router.clients` converts. What every row has in every step lies in columns,
as in the messages: a step of 256 rows makes a dozen lists, not a thousand objects.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

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


@dataclass(slots=True)
class Commits:
    """Acknowledged progress of rows."""

    rows: list[int] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    token_ids: list[bytes] = field(default_factory=list)  # little-endian int32, of full blocks

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    def add(self, row: int, num_computed_tokens: int, token_ids: bytes) -> None:
        """Row `row` has come to `num_computed_tokens`; `token_ids` are those of the blocks that became full by that."""
        self.rows.append(row)
        self.num_computed_tokens.append(num_computed_tokens)
        self.token_ids.append(token_ids)


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
    row: int
    start: int
    num_tokens: int


@dataclass(slots=True)
class StepWork:
    """The work of a step, a column for each part of it."""

    sequences: list[Sequence] = field(default_factory=list)
    incarnations: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        """Sequences that run."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Work]:
        """One after another."""
        columns = (self.sequences, self.incarnations, self.rows, self.starts, self.num_tokens)
        return map(Work, *columns)

    def copy(self) -> StepWork:
        """The same, to add to."""
        return StepWork(
            self.sequences.copy(),
            self.incarnations.copy(),
            self.rows.copy(),
            self.starts.copy(),
            self.num_tokens.copy(),
        )

    def add(self, sequence: Sequence, start: int, num_tokens: int) -> None:
        """Let `sequence`, in the row that it has, run `[start, start + num_tokens)`."""
        self.sequences.append(sequence)
        self.incarnations.append(sequence.incarnation)
        self.rows.append(sequence.row)
        self.starts.append(start)
        self.num_tokens.append(num_tokens)


@dataclass(slots=True)
class StepPlan:
    """What a step asks of memory."""

    step: int
    acknowledged_step: int = 0
    commits: Commits = field(default_factory=Commits)
    releases: list[Release] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    extends: StepWork = field(default_factory=StepWork)
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
    """The last position of a row in a step is sampled; `sequence`, the one that holds it or a sibling, gets the token."""

    source_row: int
    sequence: Sequence
    incarnation: int  # of `sequence` once it runs on with the token
    position: int  # of the token


@dataclass(slots=True)
class StepOutputs:
    """The outputs of a step, a column for each part of them."""

    source_rows: list[int] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    incarnations: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        """Tokens that are sampled."""
        return len(self.positions)

    def __iter__(self) -> Iterator[Output]:
        """One after another."""
        return map(Output, self.source_rows, self.sequences, self.incarnations, self.positions)

    def add(self, source_row: int, sequence: Sequence, incarnation: int, position: int) -> int:
        """Sample the token of `sequence` at `position` from where `source_row` ends; which output that is."""
        index = len(self.positions)
        self.source_rows.append(source_row)
        self.sequences.append(sequence)
        self.incarnations.append(incarnation)
        self.positions.append(position)
        return index


@dataclass(slots=True)
class PendingTokens:
    """Rows whose token in a step is the output of a step in flight; by row that step and the index of the output."""

    rows: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """One after another: row, step, output."""
        return zip(self.rows, self.steps, self.outputs, strict=True)

    def add(self, row: int, step: int, output: int) -> None:
        """Row `row` runs output `output` of step `step`."""
        self.rows.append(row)
        self.steps.append(step)
        self.outputs.append(output)


@dataclass(slots=True)
class StepBatch:
    """What a step asks of compute."""

    step: int
    work: StepWork
    reset: bool = False
    drop_rows: list[int] = field(default_factory=list)
    new_rows: list[Sequence] = field(default_factory=list)
    forks: list[Fork] = field(default_factory=list)
    appends: list[tuple[int, int]] = field(default_factory=list)  # (row, block)
    remaps: list[tuple[int, int, int]] = field(default_factory=list)  # (row, index, block)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (src, dst)
    pending: PendingTokens = field(default_factory=PendingTokens)
    outputs: StepOutputs = field(default_factory=StepOutputs)


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
