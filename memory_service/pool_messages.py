"""The answer of GetPool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.memory.v1 import inspection_pb2 as pb

if TYPE_CHECKING:
    from memory_service.pool import Pool
    from memory_service.pool_view import PoolView
    from memory_service.state_store import StateStore
    from memory_service.writer_place import Writer

_MIB = 1 << 20
_KNOWN_COSTS = (
    "One block table serves all layers, so layers with a sliding window keep blocks behind their window.",
    "Latent attention (MLA) is stored with its keys and values materialised.",
)
_WRITERS_COST = "The bytes lie with the compute service: when it ends, every cached prefix is lost."


def pool_message(
    view: PoolView, pool: Pool, writer: Writer | None, store: StateStore | None
) -> pb.GetPoolResponse:
    """Everything that is said of a pool."""
    found = pb.GetPoolResponse(
        revision=str(view.manager.revision),
        epoch=epoch_of(pool, store),
        pool_id=pool.pool_id,
        size_mib=pool.size_bytes / _MIB,
        block_mib=pool.block_bytes / _MIB,
        writer_generation=str(writer.generation if writer else 0),
        writer_alive=writer is not None and writer.is_connected,
        known_costs=(*_KNOWN_COSTS, _WRITERS_COST) if pool.in_writers_memory else _KNOWN_COSTS,
        placement="writer" if pool.in_writers_memory else "shared_memory",
        durable=store is not None,
        log_mib=store.num_log_bytes / _MIB if store else 0.0,
    )
    found.MergeFrom(_blocks(view))
    found.MergeFrom(_tables(view))
    if view.tenant is None:
        found.MergeFrom(_prefix_cache(view))
    return found


def epoch_of(pool: Pool, store: StateStore | None) -> str:
    """What the pool's revisions can be compared within. Without a state folder no pool outlives its service."""
    return store.epoch if store else pool.pool_id


def _blocks(view: PoolView) -> pb.GetPoolResponse:
    pool, counts = view.manager.pool, view.counts()
    return pb.GetPoolResponse(
        block_size=view.manager.block_size,
        num_blocks=pool.num_blocks,
        num_free_blocks=pool.num_free,
        num_cached_blocks=pool.num_cached,
        num_used_blocks=counts.num_used,
        num_shared_blocks=counts.num_shared,
        num_pinned_blocks=counts.num_pinned,
        num_retained_blocks=counts.num_retained,
        num_evictions=str(pool.num_evictions),
    )


def _tables(view: PoolView) -> pb.GetPoolResponse:
    slots = view.slots()
    return pb.GetPoolResponse(
        num_sessions=view.num_sessions,
        num_sequences=view.num_sequences,
        num_token_slots=str(slots.num_tokens),
        num_reserved_slots=str(slots.num_reserved),
        num_unused_slots=str(slots.num_unused),
    )


def _prefix_cache(view: PoolView) -> pb.GetPoolResponse:
    counters = view.manager.ledger.counters
    return pb.GetPoolResponse(
        num_prefix_query_tokens=str(counters.num_query_tokens),
        num_prefix_hit_tokens=str(counters.num_hit_tokens),
        num_partial_hit_tokens=str(counters.num_partial_hit_tokens),
        num_deduplicated_blocks=str(counters.num_deduplicated_blocks),
        hit_rate=counters.num_hit_tokens / max(1, counters.num_query_tokens),
    )
