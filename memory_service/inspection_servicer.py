"""The gRPC face that lets people look into the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memory_service.block_view import (
    BlockFilter,
    BlockState,
    BlockView,
    is_duration,
    is_key_prefix,
)
from memory_service.call_tenant import NO_TENANT, refuse_tenant, tenant_of
from memory_service.explanation_messages import explain
from memory_service.inspection_messages import (
    block_message,
    holder_message,
    prefix_message,
    retention_message,
    sequence_message,
    table_messages,
    tenant_message,
)
from memory_service.paging import decode_page_token, encode_page_token, page_size
from memory_service.pool_messages import pool_message
from memory_service.pool_view import PoolView
from memory_service.request_checks import raise_if_any, token_array
from memory_service.unhurried import check_in_turns, messages_in_turns
from protos.memory.v1 import inspection_pb2 as pb
from protos.memory.v1 import inspection_pb2_grpc
from quire.errors import BlockNotFound, FieldViolation, SequenceNotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import grpc

    from memory_service.call_tenant import Call
    from memory_service.explanations import Explanations
    from memory_service.pool_registry import PoolRegistry
    from memory_service.state_store import StateStore
    from memory_service.watching import Watching

_BEFORE_ALL_SEQUENCES = ("", "", -1)
_BEFORE_ALL_BLOCKS = (-1,)


class InspectionServicer(inspection_pb2_grpc.InspectionServiceServicer):
    """Implements `quire.memory.v1.InspectionService`; changes nothing.

    Args:
        registry: has the pool.
        store: of the state folder; None: nothing outlives the service.
        explanations: remembers what was decided.
        watching: lets callers watch.
    """

    def __init__(
        self,
        registry: PoolRegistry,
        store: StateStore | None,
        explanations: Explanations,
        watching: Watching,
    ) -> None:
        self._registry = registry
        self._store = store
        self._explanations = explanations
        self._watching = watching

    def _view(self, call: Call) -> PoolView:
        tenant = tenant_of(call)
        return PoolView(self._registry.pool.manager, tenant)

    async def GetPool(
        self,
        request: pb.GetPoolRequest,
        context: grpc.aio.ServicerContext[pb.GetPoolRequest, pb.GetPoolResponse],
    ) -> pb.GetPoolResponse:
        """Count the blocks."""
        return pool_message(
            self._view(context), self._registry.pool, self._registry.writer, self._store
        )

    # Sequences

    async def ListSequences(
        self,
        request: pb.ListSequencesRequest,
        context: grpc.aio.ServicerContext[pb.ListSequencesRequest, pb.ListSequencesResponse],
    ) -> pb.ListSequencesResponse:
        """Page through the live sequences."""
        size = page_size(request.page_size)
        after = decode_page_token(request.page_token, _BEFORE_ALL_SEQUENCES)
        view = self._view(context)
        rest = sorted(
            (
                live
                for live in view.sequences()
                if live.key > after
                and request.request_id in {"", live.known.request_id}
                and request.session_id in {"", live.books.session_id}
            ),
            key=lambda live: live.key,
        )
        now = view.manager.clock()
        return pb.ListSequencesResponse(
            revision=str(view.manager.revision),
            sequences=[sequence_message(live, now) for live in rest[:size]],
            next_page_token=encode_page_token(rest[size - 1].key) if len(rest) > size else "",
        )

    async def GetSequence(
        self,
        request: pb.GetSequenceRequest,
        context: grpc.aio.ServicerContext[pb.GetSequenceRequest, pb.GetSequenceResponse],
    ) -> pb.GetSequenceResponse:
        """Show one block table."""
        view = self._view(context)
        found = view.named(request.sequence_id)
        if not found:
            message = (
                f"no sequence has the id {request.sequence_id!r}; "
                "ListSequences shows those that live"
            )
            raise SequenceNotFound(message, metadata={"sequence_id": request.sequence_id})
        manager = view.manager
        return pb.GetSequenceResponse(
            revision=str(manager.revision),
            sequence=sequence_message(found[0], manager.clock()),
            block_table=table_messages(manager, found[0]),
        )

    # Blocks

    async def ListBlocks(
        self,
        request: pb.ListBlocksRequest,
        context: grpc.aio.ServicerContext[pb.ListBlocksRequest, pb.ListBlocksResponse],
    ) -> pb.ListBlocksResponse:
        """Page through the blocks that pass all filters."""
        raise_if_any(_filter_violations(request))
        size = page_size(request.page_size)
        (after,) = decode_page_token(request.page_token, _BEFORE_ALL_BLOCKS)
        view = self._view(context)
        blocks = BlockView(view)
        matches = blocks.matches(_filter(request))
        begin = int(matches.searchsorted(after, side="right"))
        page = matches[begin : begin + size].tolist()
        is_last = begin + size >= len(matches)
        revision, found = view.manager.revision, [blocks.block(block_id) for block_id in page]
        return pb.ListBlocksResponse(
            revision=str(revision),
            blocks=await messages_in_turns(block_message, found),
            next_page_token="" if is_last else encode_page_token((page[-1],)),
            num_matches=len(matches),
        )

    async def GetBlock(
        self,
        request: pb.GetBlockRequest,
        context: grpc.aio.ServicerContext[pb.GetBlockRequest, pb.GetBlockResponse],
    ) -> pb.GetBlockResponse:
        """Show one block and who holds it."""
        view = self._view(context)
        blocks, block_id = BlockView(view), request.block_id
        if not blocks.is_shown(block_id):
            message = f"there is no block {block_id}; ListBlocks shows those that there are"
            raise BlockNotFound(message, metadata={"block_id": block_id})
        return pb.GetBlockResponse(
            revision=str(view.manager.revision),
            block=block_message(blocks.block(block_id)),
            holders=[holder_message(found) for found in blocks.holders(block_id)],
        )

    # Tenants

    async def ListTenants(
        self,
        request: pb.ListTenantsRequest,
        context: grpc.aio.ServicerContext[pb.ListTenantsRequest, pb.ListTenantsResponse],
    ) -> pb.ListTenantsResponse:
        """Show each tenant's share."""
        view = self._view(context)
        return pb.ListTenantsResponse(
            revision=str(view.manager.revision),
            tenants=[tenant_message(found) for found in view.tenants()],
        )

    async def ListRetentions(
        self,
        request: pb.ListRetentionsRequest,
        context: grpc.aio.ServicerContext[pb.ListRetentionsRequest, pb.ListRetentionsResponse],
    ) -> pb.ListRetentionsResponse:
        """Show what is kept longer, and what all share."""
        view = self._view(context)
        manager = view.manager
        published = sorted(manager.ledger.retentions.published.items())
        return pb.ListRetentionsResponse(
            revision=str(manager.revision),
            retentions=[retention_message(found) for found in view.retentions()],
            published_prefixes=[prefix_message(manager, *found) for found in published],
        )

    async def ProbePrefix(
        self,
        request: pb.ProbePrefixRequest,
        context: grpc.aio.ServicerContext[pb.ProbePrefixRequest, pb.ProbePrefixResponse],
    ) -> pb.ProbePrefixResponse:
        """Say what an admission would hit."""
        tenant = tenant_of(context) or NO_TENANT
        manager = self._registry.whole_pool.manager
        token_ids = token_array("token_ids", request.token_ids, manager)
        hit, size = manager.probe(token_ids, tenant), manager.block_size
        num_in_progress = 0
        for key in hit.missing_keys:
            if not manager.pool.index.is_in_progress(key):
                break
            num_in_progress += size
        return pb.ProbePrefixResponse(
            revision=str(manager.revision),
            num_cached_tokens=hit.num_tokens(size),
            num_shared_tokens=len(hit.block_ids) * size,
            num_needed_blocks=-(-len(token_ids) // size) - len(hit.block_ids),
            num_in_progress_tokens=num_in_progress,
        )

    # What happened, and what happens

    async def Explain(
        self,
        request: pb.ExplainRequest,
        context: grpc.aio.ServicerContext[pb.ExplainRequest, pb.ExplainResponse],
    ) -> pb.ExplainResponse:
        """Say why something was decided."""
        tenant, manager = tenant_of(context), self._registry.pool.manager
        return explain(self._explanations, request, tenant, manager.revision)

    def Watch(
        self,
        request: pb.WatchRequest,
        context: grpc.aio.ServicerContext[pb.WatchRequest, pb.WatchResponse],
    ) -> AsyncIterator[pb.WatchResponse]:
        """Show the state, then every change."""
        return self._watching.watch(request.resume_token, context)

    async def CheckIntegrity(
        self,
        request: pb.CheckIntegrityRequest,
        context: grpc.aio.ServicerContext[pb.CheckIntegrityRequest, pb.CheckIntegrityResponse],
    ) -> pb.CheckIntegrityResponse:
        """Compare the books, part by part, between which steps are answered."""
        refuse_tenant(context, "the books are those of the whole pool")
        manager = self._registry.pool.manager
        findings = await check_in_turns(manager)
        return pb.CheckIntegrityResponse(revision=str(manager.revision), findings=findings)


def _filter_violations(request: pb.ListBlocksRequest) -> Iterator[FieldViolation]:
    if request.state not in pb.BlockState.values():
        yield FieldViolation("state", "is no state of a block")
    if request.min_ref_count < 0:
        yield FieldViolation("min_ref_count", "is below 0")
    if not is_key_prefix(request.block_hash_prefix.lower()):
        yield FieldViolation("block_hash_prefix", "is not up to 32 hexadecimal digits")
    if not is_duration(request.min_idle_seconds):
        yield FieldViolation("min_idle_seconds", "is not a finite number from 0 on")


def _filter(request: pb.ListBlocksRequest) -> BlockFilter:
    return BlockFilter(
        BlockState(request.state) if request.state else None,
        request.min_ref_count,
        request.block_hash_prefix.lower(),
        request.sequence_id,
        request.retained,
        request.min_idle_seconds,
    )
