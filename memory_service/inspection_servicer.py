"""The gRPC face that lets people look into the pool."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from memory_service.integrity import check_integrity
from protos.memory.v1 import inspection_pb2 as pb
from protos.memory.v1 import inspection_pb2_grpc
from quire.errors import FieldViolation, InvalidRequest, SequenceNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator

    import grpc
    import numpy as np

    from memory_service.block_manager import BlockManager
    from memory_service.pool_registry import PoolRegistry
    from memory_service.sequence_table import Sequence, SequenceTable
    from memory_service.sessions import Sessions

_MIB = 1 << 20
_DEFAULT_PAGE_SIZE = 100
_MAX_PAGE_SIZE = 1000
_KNOWN_COSTS = (
    "One block table serves all layers, so layers with a sliding window keep blocks behind their window.",
    "Latent attention (MLA) is stored with its keys and values materialised.",
)
_WRITERS_COST = "The bytes lie with the compute service: when it ends, every cached prefix is lost."


class InspectionServicer(inspection_pb2_grpc.InspectionServiceServicer):
    """Implements `quire.memory.v1.InspectionService`; changes nothing."""

    def __init__(self, registry: PoolRegistry, sessions: Sessions) -> None:
        self._registry = registry
        self._sessions = sessions

    async def GetPool(
        self,
        request: pb.GetPoolRequest,
        context: grpc.aio.ServicerContext[pb.GetPoolRequest, pb.GetPoolResponse],
    ) -> pb.GetPoolResponse:
        """Count the blocks."""
        found, writer = self._registry.pool, self._registry.writer
        manager, pool = found.manager, found.manager.pool
        used = (pool.ref_counts > 0) | (pool.pins > 0)
        return pb.GetPoolResponse(
            revision=str(manager.revision),
            pool_id=found.pool_id,
            block_size=manager.block_size,
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_used_blocks=int(used.sum()),
            num_shared_blocks=int((pool.ref_counts > 1).sum()),
            num_pinned_blocks=int((pool.pins > 0).sum()),
            size_mib=found.size_bytes / _MIB,
            block_mib=found.block_bytes / _MIB,
            num_sequences=manager.num_sequences,
            num_prefix_query_tokens=str(manager.num_prefix_query_tokens),
            num_prefix_hit_tokens=str(manager.num_prefix_hit_tokens),
            num_evictions=str(pool.num_evictions),
            num_sessions=len(self._sessions),
            writer_generation=str(writer.generation if writer else 0),
            writer_alive=writer is not None and writer.is_connected,
            known_costs=(*_KNOWN_COSTS, _WRITERS_COST) if found.in_writers_memory else _KNOWN_COSTS,
            placement="writer" if found.in_writers_memory else "shared_memory",
        )

    async def ListSequences(
        self,
        request: pb.ListSequencesRequest,
        context: grpc.aio.ServicerContext[pb.ListSequencesRequest, pb.ListSequencesResponse],
    ) -> pb.ListSequencesResponse:
        """Page through the live sequences; the token is the last id of the page before."""
        if request.page_size < 0:
            raise InvalidRequest.of([FieldViolation("page_size", "is below 0")])
        size = min(request.page_size or _DEFAULT_PAGE_SIZE, _MAX_PAGE_SIZE)
        after = _decode_page_token(request.page_token)
        manager = self._registry.pool.manager
        found = sorted(self._all(manager), key=lambda message: message.sequence_id)
        rest = [message for message in found if message.sequence_id > after]
        return pb.ListSequencesResponse(
            revision=str(manager.revision),
            sequences=rest[:size],
            next_page_token=_PAGE_PREFIX + rest[size - 1].sequence_id if len(rest) > size else "",
        )

    def _all(self, manager: BlockManager) -> Iterator[pb.Sequence]:
        names = self._sessions.names()
        for session_key, books in manager.sessions:
            for row, found in books.table.items():
                yield _sequence(names[session_key], row, found, books.table)

    async def GetSequence(
        self,
        request: pb.GetSequenceRequest,
        context: grpc.aio.ServicerContext[pb.GetSequenceRequest, pb.GetSequenceResponse],
    ) -> pb.GetSequenceResponse:
        """Show one block table."""
        manager, names = self._registry.pool.manager, self._sessions.names()
        for session_key, books in manager.sessions:
            for row, found in books.table.items():
                if found.sequence_id == request.sequence_id:
                    return pb.GetSequenceResponse(
                        revision=str(manager.revision),
                        sequence=_sequence(names[session_key], row, found, books.table),
                        block_table=_entries(manager, books.table.block_table(row)),
                    )
        message = (
            f"no sequence has the id {request.sequence_id!r}; ListSequences shows those that live"
        )
        raise SequenceNotFound(message, metadata={"sequence_id": request.sequence_id})

    async def CheckIntegrity(
        self,
        request: pb.CheckIntegrityRequest,
        context: grpc.aio.ServicerContext[pb.CheckIntegrityRequest, pb.CheckIntegrityResponse],
    ) -> pb.CheckIntegrityResponse:
        """Compare the books."""
        manager = self._registry.pool.manager
        return pb.CheckIntegrityResponse(
            revision=str(manager.revision), findings=check_integrity(manager)
        )


_PAGE_PREFIX = "after:"


def _decode_page_token(token: str) -> str:
    if token and not token.startswith(_PAGE_PREFIX):
        raise InvalidRequest.of([FieldViolation("page_token", "is none that this service gave")])
    return token.removeprefix(_PAGE_PREFIX)


def _sequence(session_id: str, row: int, found: Sequence, table: SequenceTable) -> pb.Sequence:
    return pb.Sequence(
        sequence_id=found.sequence_id,
        request_id=found.request_id,
        session_id=session_id,
        row=row,
        incarnation=found.incarnation,
        num_computed_tokens=int(table.num_computed[row]),
        num_cached_tokens=found.num_cached_tokens,
        num_blocks=int(table.num_blocks[row]),
        age_seconds=time.monotonic() - found.admitted_at,
    )


def _entries(
    manager: BlockManager, block_table: np.ndarray[tuple[int], np.dtype[np.int32]]
) -> list[pb.TableEntry]:
    pool = manager.pool
    return [
        pb.TableEntry(
            block_id=block_id,
            ref_count=int(pool.ref_counts[block_id]),
            sealed=bool(pool.sealed[block_id]),
            block_hash=(pool.index.key_of(block_id) or b"").hex(),
        )
        for block_id in block_table.tolist()
    ]
