"""Changing how tenants share the pool, from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from google.protobuf.duration_pb2 import Duration

from protos.memory.v1 import control_pb2 as pb
from protos.memory.v1 import control_pb2_grpc
from quire.client.channel import SHORT_TIMEOUT_S
from quire.client.memory_calls import MemoryConnection
from quire.errors import FieldViolation, InvalidRequest

if TYPE_CHECKING:
    from quire.client.memory_calls import TokenIds

# The answers of the service, under names that say nothing of the wire.
QuotaAnswer: TypeAlias = pb.SetQuotaResponse
RetainAnswer: TypeAlias = pb.RetainResponse
ReleaseAnswer: TypeAlias = pb.ReleaseResponse
FlushAnswer: TypeAlias = pb.FlushResponse
PublishAnswer: TypeAlias = pb.PublishPrefixResponse
WithdrawAnswer: TypeAlias = pb.WithdrawPrefixResponse

_MS = 1000


class PoolController(MemoryConnection):
    """A connection to the memory service's control.

    A wish that was met in part or not at all is an answer with its `verdict` and `reason`, no error. `tenant` is whom a
    call speaks for; None: the tenant of all who have none. No call is repeated by itself: a second Retain would be
    another retention.
    """

    def __init__(self, address: str, *, timeout_s: float = SHORT_TIMEOUT_S) -> None:
        super().__init__(address, timeout_s=timeout_s)
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)

    def set_quota(
        self, tenant: str, *, soft_blocks: int | None, hard_blocks: int | None
    ) -> QuotaAnswer:
        """Set both bounds of a tenant; None: no such bound."""
        request = pb.SetQuotaRequest(
            tenant=tenant, soft_quota_blocks=soft_blocks, hard_quota_blocks=hard_blocks
        )
        return self._ask(self._stub.SetQuota, request)

    def retain(
        self,
        *,
        sequence_id: str | None = None,
        token_ids: TokenIds | None = None,
        priority: int,
        time_to_live_s: float | None = None,
        tenant: str | None = None,
    ) -> RetainAnswer:
        """Keep the blocks of a live sequence, or of a run of tokens, from being evicted before others."""
        if (sequence_id is None) == (token_ids is None):
            raise InvalidRequest.of(
                [FieldViolation("sequence_id", "is retained, or token_ids: exactly one of them")]
            )
        request = pb.RetainRequest(priority=priority)
        if sequence_id is not None:
            request.sequence_id = sequence_id
        else:
            request.prefix.CopyFrom(pb.TokenRun(token_ids=token_ids))
        if time_to_live_s is not None:
            request.time_to_live.CopyFrom(_duration(time_to_live_s))
        return self._ask(self._stub.Retain, request, tenant)

    def release(self, retention_id: str, *, tenant: str | None = None) -> ReleaseAnswer:
        """End a retention; its blocks stay cached."""
        request = pb.ReleaseRequest(retention_id=retention_id)
        return self._ask(self._stub.Release, request, tenant)

    def flush(self, token_ids: TokenIds = (), *, tenant: str | None = None) -> FlushAnswer:
        """Forget what begins with `token_ids`; without any, all cached content of the tenant."""
        request = pb.FlushRequest(token_ids=token_ids)
        return self._ask(self._stub.Flush, request, tenant)

    def publish_prefix(self, token_ids: TokenIds, *, tenant: str | None = None) -> PublishAnswer:
        """Let all tenants share the full blocks of `token_ids`."""
        request = pb.PublishPrefixRequest(token_ids=token_ids)
        return self._ask(self._stub.PublishPrefix, request, tenant)

    def withdraw_prefix(self, prefix_id: str, *, tenant: str | None = None) -> WithdrawAnswer:
        """End the sharing of a published prefix."""
        request = pb.WithdrawPrefixRequest(prefix_id=prefix_id)
        return self._ask(self._stub.WithdrawPrefix, request, tenant)


def _duration(seconds: float) -> Duration:
    found = Duration()
    found.FromMilliseconds(max(1, round(seconds * _MS)))
    return found
