"""The nouns of a local picture of the pool, and how they are read from messages."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from protos.memory.v1 import inspection_pb2 as pb
from quire.client.rate_window import Rates

if TYPE_CHECKING:
    from collections.abc import Iterable

StateArray: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int8]]
CountArray: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int32]]
RowKey: TypeAlias = tuple[str, int]  # session id, row


class BlockState(IntEnum):
    """Where a block is in its life; numbers of the contract."""

    FREE = pb.BLOCK_STATE_FREE
    CACHED = pb.BLOCK_STATE_CACHED
    USED = pb.BLOCK_STATE_USED
    NULL = pb.BLOCK_STATE_NULL


@dataclass(slots=True)
class MirroredSequence:
    """A live sequence."""

    sequence_id: str
    request_id: str
    tenant: str
    num_computed_tokens: int
    num_cached_tokens: int
    admitted_at: float  # by the mirror's clock
    block_table: list[int]

    def copy(self) -> MirroredSequence:
        """One that later changes leave alone."""
        return replace(self, block_table=list(self.block_table))


@dataclass(frozen=True, slots=True)
class MirroredTenant:
    """What blocks count against."""

    name: str
    num_blocks: int
    num_cached_blocks: int
    num_sequences: int
    soft_quota_blocks: int | None
    hard_quota_blocks: int | None

    @property
    def has_quota(self) -> bool:
        """Whether it is bounded."""
        return self.soft_quota_blocks is not None or self.hard_quota_blocks is not None

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to say of it."""
        return not (self.num_blocks or self.num_sequences or self.has_quota)


@dataclass(frozen=True, slots=True)
class MirrorCounts:
    """How full the pool is, in the service's own numbers."""

    num_blocks: int = 0  # the null block included
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_used_blocks: int = 0
    num_sequences: int = 0
    num_prefix_query_tokens: int = 0  # since the pool began, as the next two
    num_prefix_hit_tokens: int = 0
    num_evictions: int = 0


@dataclass(slots=True)
class MirrorView:
    """The picture at one revision; whoever looks gets a copy."""

    epoch: str
    revision: str
    block_size: int
    counts: MirrorCounts
    states: StateArray  # BlockState of each block, by block id
    ref_counts: CountArray  # tables that hold each block
    sequences: dict[RowKey, MirroredSequence]
    tenants: dict[str, MirroredTenant]
    now: float = 0.0  # by the mirror's clock
    rates: Rates = field(default_factory=Rates)

    def of_tenant(self, name: str) -> MirrorView:
        """The same with only this tenant's sequences; all else is of the whole pool."""
        found = {key: one for key, one in self.sequences.items() if one.tenant == name}
        return replace(self, sequences=found)


def read_blocks(runs: Iterable[pb.BlockRun], num_blocks: int) -> tuple[StateArray, CountArray]:
    """States and reference counts by block id; raises ValueError when `runs` leave a block out."""
    states = np.zeros(num_blocks, dtype=np.int8)
    ref_counts = np.zeros(num_blocks, dtype=np.int32)
    for run in runs:
        where = slice(run.first_block_id, run.first_block_id + run.num_blocks)
        states[where], ref_counts[where] = run.state, run.ref_count
    if not states.all():
        message = "the parts of a snapshot do not cover the pool"
        raise ValueError(message)
    return states, ref_counts


def read_sequence(found: pb.WatchedSequence, now: float) -> tuple[RowKey, MirroredSequence]:
    """The sequence and where it is, its age as of `now`."""
    sequence = found.sequence
    return (sequence.session_id, sequence.row), MirroredSequence(
        sequence.sequence_id,
        sequence.request_id,
        sequence.tenant,
        sequence.num_computed_tokens,
        sequence.num_cached_tokens,
        now - sequence.age_seconds,
        list(found.block_table),
    )


def read_tenant(found: pb.Tenant) -> MirroredTenant:
    """The tenant."""
    return MirroredTenant(
        found.tenant,
        found.num_blocks,
        found.num_cached_blocks,
        found.num_sequences,
        found.soft_quota_blocks if found.HasField("soft_quota_blocks") else None,
        found.hard_quota_blocks if found.HasField("hard_quota_blocks") else None,
    )


def read_counts(found: pb.PoolCounts) -> MirrorCounts:
    """The counts; a number that the service left out is 0."""
    return MirrorCounts(
        found.num_blocks,
        found.num_free_blocks,
        found.num_cached_blocks,
        found.num_used_blocks,
        found.num_sequences,
        int(found.num_prefix_query_tokens or 0),
        int(found.num_prefix_hit_tokens or 0),
        int(found.num_evictions or 0),
    )
