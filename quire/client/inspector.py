"""Looking into the memory service from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self, TypeAlias

from protos.memory.v1 import inspection_pb2 as pb
from protos.memory.v1 import inspection_pb2_grpc
from quire.client.channel import SHORT_TIMEOUT_S
from quire.client.memory_calls import MemoryConnection
from quire.client.sync import raising_quire_errors
from quire.errors import FieldViolation, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    import grpc

    from quire.client.memory_calls import TokenIds

# The answers of the service, under names that say nothing of the wire.
Pool: TypeAlias = pb.GetPoolResponse
Sequence: TypeAlias = pb.Sequence
SequenceAnswer: TypeAlias = pb.GetSequenceResponse
Block: TypeAlias = pb.Block
BlockAnswer: TypeAlias = pb.GetBlockResponse
TenantsAnswer: TypeAlias = pb.ListTenantsResponse
RetentionsAnswer: TypeAlias = pb.ListRetentionsResponse
ProbeAnswer: TypeAlias = pb.ProbePrefixResponse
ExplainAnswer: TypeAlias = pb.ExplainResponse
WatchAnswer: TypeAlias = pb.WatchResponse
PoolCounts: TypeAlias = pb.PoolCounts
StateName: TypeAlias = Literal["free", "cached", "used", "null"]

_PAGE_SIZE = 1000


class Watch:
    """Iterates the answers of a Watch: a snapshot in parts, then every change, until `cancel()` or an error."""

    def __init__(self, call: grpc._CallIterator[WatchAnswer]) -> None:
        self._call = call

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> WatchAnswer:
        with raising_quire_errors():
            return next(self._call)

    def wait_until_accepted(self) -> bool:
        """Whether the service took the call on; when it did not, the iteration raises why.

        A resumed stream may have nothing to say for long: this tells the difference from a service that is away.
        """
        self._call.initial_metadata()
        return bool(self._call.is_active())

    def cancel(self) -> None:
        """End the stream; whoever iterates it gets a RemoteError CANCELLED."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class PoolInspector(MemoryConnection):
    """A connection to the memory service's read-only inspection.

    Each answer holds at its `revision`. `tenant` narrows an answer to what is one tenant's; None: all of them.
    """

    def __init__(self, address: str, *, timeout_s: float = SHORT_TIMEOUT_S) -> None:
        super().__init__(address, timeout_s=timeout_s)
        self._stub = inspection_pb2_grpc.InspectionServiceStub(self._channel)

    def get_pool(self, *, tenant: str | None = None, timeout_s: float | None = None) -> Pool:
        """Counts of blocks; raises NoPool before a compute service attached."""
        return self._ask(self._stub.GetPool, pb.GetPoolRequest(), tenant, timeout_s=timeout_s)

    def list_sequences(
        self, *, request_id: str = "", session_id: str = "", tenant: str | None = None
    ) -> Iterator[Sequence]:
        """Live sequences by id, page by page; each page is of a revision of its own."""
        token = ""
        while True:
            request = pb.ListSequencesRequest(
                page_size=_PAGE_SIZE,
                page_token=token,
                request_id=request_id,
                session_id=session_id,
            )
            page = self._ask(self._stub.ListSequences, request, tenant)
            yield from page.sequences
            token = page.next_page_token
            if not token:
                return

    def get_sequence(self, sequence_id: str, *, tenant: str | None = None) -> SequenceAnswer:
        """One sequence with its block table; raises SequenceNotFound."""
        request = pb.GetSequenceRequest(sequence_id=sequence_id)
        return self._ask(self._stub.GetSequence, request, tenant)

    def list_blocks(
        self,
        *,
        state: StateName | None = None,
        min_ref_count: int = 0,
        block_hash_prefix: str = "",
        sequence_id: str = "",
        retained: bool = False,
        min_idle_seconds: float = 0.0,
        tenant: str | None = None,
    ) -> Iterator[Block]:
        """Blocks that pass all filters, by id, page by page; each page is of a revision of its own."""
        request = pb.ListBlocksRequest(
            page_size=_PAGE_SIZE,
            state=pb.BlockState.Value(f"BLOCK_STATE_{(state or 'unspecified').upper()}"),
            min_ref_count=min_ref_count,
            block_hash_prefix=block_hash_prefix,
            sequence_id=sequence_id,
            retained=retained,
            min_idle_seconds=min_idle_seconds,
        )
        while True:
            page = self._ask(self._stub.ListBlocks, request, tenant)
            yield from page.blocks
            request.page_token = page.next_page_token
            if not request.page_token:
                return

    def get_block(self, block_id: int, *, tenant: str | None = None) -> BlockAnswer:
        """One block with all who hold it; raises BlockNotFound."""
        request = pb.GetBlockRequest(block_id=block_id)
        return self._ask(self._stub.GetBlock, request, tenant)

    def list_tenants(self, *, tenant: str | None = None) -> TenantsAnswer:
        """What each tenant holds and may hold."""
        return self._ask(self._stub.ListTenants, pb.ListTenantsRequest(), tenant)

    def list_retentions(self, *, tenant: str | None = None) -> RetentionsAnswer:
        """What is retained, and which prefixes are published."""
        return self._ask(self._stub.ListRetentions, pb.ListRetentionsRequest(), tenant)

    def probe_prefix(self, token_ids: TokenIds, *, tenant: str | None = None) -> ProbeAnswer:
        """How many leading tokens would hit if they were admitted now for `tenant`; touches nothing."""
        request = pb.ProbePrefixRequest(token_ids=token_ids)
        return self._ask(self._stub.ProbePrefix, request, tenant)

    def explain(
        self,
        *,
        sequence_id: str = "",
        block_id: int | None = None,
        tenant: str | None = None,
    ) -> ExplainAnswer:
        """Why a sequence was refused, preempted or released, or why a block was evicted, newest first."""
        if bool(sequence_id) == (block_id is not None):
            raise InvalidRequest.of(
                [FieldViolation("sequence_id", "is asked about, or block_id: exactly one of them")]
            )
        request = pb.ExplainRequest(sequence_id=sequence_id, block_id=block_id)
        return self._ask(self._stub.Explain, request, tenant)

    def check_integrity(self) -> list[str]:
        """What does not agree in the pool's books; empty when all is well."""
        return list(self._ask(self._stub.CheckIntegrity, pb.CheckIntegrityRequest()).findings)

    def watch(self, *, resume_token: str = "") -> Watch:
        """The state, then every change, without a deadline; `resume_token` goes on behind an earlier answer.

        It is of the whole pool: when whose blocks change would tell one tenant of others. Errors come from the iteration.
        The call is not repeated when the service is away; see `Watching`.
        """
        return Watch(self._stub.Watch(pb.WatchRequest(resume_token=resume_token)))
