"""What one step demands of memory and what it gets; mirrors `quire.memory.v1`, the servicer converts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memory_service.record import ReleaseReason

    IntArray = NDArray[np.int32]


def _empty() -> IntArray:
    return np.empty(0, dtype=np.int32)


class RefusalReason(Enum):
    """Why a demand was not met."""

    NO_BLOCKS = 1
    PREFIX_IN_PROGRESS = 2
    TOKEN_BUDGET = 3
    OVER_QUOTA = 4
    LARGER_THAN_QUOTA = 5


@dataclass(frozen=True, slots=True)
class Admit:
    """A new sequence."""

    row: int
    incarnation: int
    sequence_id: str
    request_id: str
    token_ids: IntArray
    num_sequences: int = 1
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Fork:
    """A sequence that shares `[0, num_tokens)` of another one."""

    src_row: int
    dst_row: int
    dst_incarnation: int
    sequence_id: str
    request_id: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepDemand:
    """All that one step demands, in the order in which it is applied."""

    step: int
    acknowledged_step: int = 0
    commit_rows: IntArray = field(default_factory=_empty)
    commit_num_computed_tokens: IntArray = field(default_factory=_empty)
    commit_token_ids: IntArray = field(default_factory=_empty)  # of the blocks that became full
    releases: tuple[int, ...] = ()
    release_reasons: tuple[ReleaseReason, ...] = ()  # parallel to releases, or empty
    forks: tuple[Fork, ...] = ()
    extend_rows: IntArray = field(default_factory=_empty)
    extend_starts: IntArray = field(default_factory=_empty)
    extend_num_tokens: IntArray = field(default_factory=_empty)
    admits: tuple[Admit, ...] = ()
    admit_token_budget: int = 0
    watermark_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Admission:
    """An admitted sequence."""

    row: int
    num_cached_tokens: int
    num_scheduled_tokens: int
    block_table: IntArray


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a demand was not met, with the numbers that decided where blocks did."""

    sequence_id: str
    request_id: str
    tenant: str
    reason: RefusalReason
    num_needed_blocks: int
    num_available_blocks: int


@dataclass(slots=True)
class StepAnswer:
    """What memory gave and refused."""

    step: int
    admissions: list[Admission] = field(default_factory=list)
    new_blocks: list[tuple[int, int]] = field(default_factory=list)  # (row, block)
    forked_tables: list[tuple[int, IntArray]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (src, dst)
    remaps: list[tuple[int, int, int]] = field(default_factory=list)  # (row, index, block)
    refusals: list[tuple[int, RefusalReason]] = field(default_factory=list)
    num_available_blocks: int = 0
    shortages: list[Shortage] = field(default_factory=list)  # parallel to refusals

    def refuse(self, row: int, shortage: Shortage) -> None:
        """The demand of `row` is not met."""
        self.refusals.append((row, shortage.reason))
        self.shortages.append(shortage)
