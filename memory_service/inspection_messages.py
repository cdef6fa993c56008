"""Views of a pool as messages of `quire.memory.v1`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.timestamp_pb2 import Timestamp

from memory_service.public_ids import prefix_name, retention_name
from protos.memory.v1 import inspection_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memory_service.block_hash import BlockHash
    from memory_service.block_manager import BlockManager
    from memory_service.block_view import BlockHolder, BlockInfo
    from memory_service.pool_view import LiveSequence
    from memory_service.retention import Retention
    from memory_service.tenants import Tenant


def timestamp(seconds: float | None) -> Timestamp | None:
    """A point in time; None stays absent."""
    if seconds is None:
        return None
    found = Timestamp()
    found.FromMicroseconds(round(seconds * 1e6))
    return found


def sequence_message(live: LiveSequence, now: float) -> pb.Sequence:
    """A sequence without its table."""
    known = live.known
    return pb.Sequence(
        sequence_id=known.sequence_id,
        request_id=known.request_id,
        session_id=live.books.session_id,
        row=live.row,
        incarnation=known.incarnation,
        num_computed_tokens=live.num_computed_tokens,
        num_cached_tokens=known.num_cached_tokens,
        num_blocks=live.num_blocks,
        age_seconds=max(0.0, now - known.admitted_at),
        tenant=known.tenant.name,
    )


def table_messages(manager: BlockManager, live: LiveSequence) -> Iterator[pb.TableEntry]:
    """The entries of a block table."""
    pool = manager.pool
    for block_id in live.block_table.tolist():
        key = pool.index.key_of(block_id) if pool.index.is_indexed(block_id) else None
        yield pb.TableEntry(
            block_id=block_id,
            ref_count=int(pool.ref_counts[block_id]),
            sealed=bool(pool.sealed[block_id]),
            block_hash=(key or b"").hex(),
        )


def block_message(block: BlockInfo) -> pb.Block:
    """A block."""
    return pb.Block(
        block_id=block.block_id,
        state=pb.BlockState.ValueType(block.state),
        ref_count=block.ref_count,
        pinned=block.is_pinned,
        sealed=block.is_sealed,
        block_hash=block.key.hex(),
        generation=str(block.generation),
        tenant=block.tenant,
        idle_seconds=block.idle_s,
        retention_id=retention_name(block.retention_id) if block.retention_id else "",
        priority=block.priority,
    )


def holder_message(holder: BlockHolder) -> pb.BlockHolder:
    """A table entry that names a block."""
    return pb.BlockHolder(
        sequence_id=holder.sequence_id,
        request_id=holder.request_id,
        session_id=holder.session_id,
        index=holder.index,
    )


def tenant_message(tenant: Tenant) -> pb.Tenant:
    """A tenant's share."""
    return pb.Tenant(
        tenant=tenant.name,
        num_blocks=tenant.num_blocks,
        num_cached_blocks=tenant.num_cached,
        num_sequences=tenant.num_sequences,
        soft_quota_blocks=tenant.soft_blocks,
        hard_quota_blocks=tenant.hard_blocks,
    )


def retention_message(retention: Retention) -> pb.Retention:
    """A retention."""
    home = retention.home
    return pb.Retention(
        retention_id=retention_name(retention.retention_id),
        tenant=home.tenant.name,
        priority=home.priority,
        num_blocks=home.num_blocks,
        expire_time=timestamp(retention.expires_at),
    )


def prefix_message(
    manager: BlockManager, prefix_id: int, keys: tuple[BlockHash, ...]
) -> pb.PublishedPrefix:
    """A published prefix."""
    find = manager.pool.index.find
    return pb.PublishedPrefix(
        prefix_id=prefix_name(prefix_id),
        num_tokens=len(keys) * manager.block_size,
        num_present_blocks=sum(find(key) > 0 for key in keys),
    )
