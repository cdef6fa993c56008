"""Records: every change of the pool's state, as plain values. The state is the fold of its records.

The manager makes them, `memory_service.fold` applies them to a state that has seen all before, `memory_service.log_codec`
turns them into bytes and back. They say what was decided, never why: a fold decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from memory_service.block_hash import BlockHash
    from memory_service.demand import Fork, IntArray


class ReleaseReason(Enum):
    """Why a sequence was given up."""

    UNSPECIFIED = 0
    FINISHED = 1
    PREEMPTED = 2
    CANCELLED = 3
    FAILED = 4
    RESUMED = 5
    LAPSED = 6  # the session ended; never said by a router


def _no_rows(width: int) -> IntArray:
    return np.empty((0, width), dtype=np.int32)


@dataclass(frozen=True, slots=True)
class AdmissionRecord:
    """A sequence that came in."""

    row: int
    incarnation: int
    sequence_id: str
    request_id: str
    tenant: str
    num_tokens: int  # known at admission
    num_cached_tokens: int
    num_hit_blocks: int  # leading entries of the table that were there already
    block_table: IntArray
    partial_source: int  # block whose copy the first new block begins with; 0 for none
    expected_keys: bytes  # keys of the full blocks behind the hit, 16 bytes each


@dataclass(frozen=True, slots=True)
class StepApplied:
    """One step of a session. The parts were applied in the order of the fields."""

    session_key: int
    step: int
    acknowledged_step: int
    commit_rows: IntArray
    commit_num_computed_tokens: IntArray
    seals: IntArray = field(default_factory=lambda: _no_rows(3))  # (row, index, block that stays)
    seal_keys: bytes = b""  # 16 bytes a seal; empty without a prefix cache
    seal_token_ids: bytes = b""  # `block_size` int32 a seal; empty without a prefix cache
    releases: IntArray = field(default_factory=lambda: _no_rows(2))  # (row, ReleaseReason)
    forks: tuple[Fork, ...] = ()
    # (row, index, block, source): an entry appended (source 0), or replaced by a copy of `source`.
    takes: IntArray = field(default_factory=lambda: _no_rows(4))
    admissions: tuple[AdmissionRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """A session began, or was resumed by a new stream."""

    session_key: int
    session_id: str
    max_num_rows: int
    generation: int


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """A session is over; all that it held returned to the pool."""

    session_key: int


@dataclass(frozen=True, slots=True)
class WriterAttached:
    """A compute service was let in."""

    generation: int
    pid: int  # 0 when it is not known in our PID namespace
    started_ticks: int  # of that process since boot, so that a recycled pid is noticed


@dataclass(frozen=True, slots=True)
class QuotaSet:
    """A tenant's bounds changed."""

    tenant: str
    soft_blocks: int | None
    hard_blocks: int | None


@dataclass(frozen=True, slots=True)
class Retained:
    """Blocks, and perhaps a sequence, came under a retention."""

    retention_id: int
    tenant: str
    priority: int
    expires_at: float | None  # seconds since the epoch
    block_ids: IntArray
    session_key: int = 0  # of the retained sequence; 0 for none
    row: int = 0


@dataclass(frozen=True, slots=True)
class RetentionEnded:
    """A retention was released or expired."""

    retention_id: int


@dataclass(frozen=True, slots=True)
class Flushed:
    """Blocks left the prefix index, in this order."""

    block_ids: IntArray


@dataclass(frozen=True, slots=True)
class PrefixPublished:
    """All tenants share the blocks of these keys."""

    prefix_id: int
    keys: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True)
class PrefixWithdrawn:
    """The sharing ended."""

    prefix_id: int


Change: TypeAlias = (
    StepApplied
    | SessionOpened
    | SessionEnded
    | WriterAttached
    | QuotaSet
    | Retained
    | RetentionEnded
    | Flushed
    | PrefixPublished
    | PrefixWithdrawn
)


@dataclass(frozen=True, slots=True)
class Record:
    """One change and the revision that it led to."""

    revision: int
    time: float  # seconds since the epoch
    change: Change
