"""The gRPC face through which tenants and operators change how the pool is shared."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import numpy as np

from memory_service.call_tenant import NO_TENANT, name_violation, refuse_tenant, tenant_of
from memory_service.inspection_messages import tenant_message, timestamp
from memory_service.public_ids import parse_prefix, parse_retention, prefix_name, retention_name
from memory_service.request_checks import raise_if_any, token_array
from memory_service.tenants import MAX_PRIORITY
from protos.memory.v1 import control_pb2 as pb
from protos.memory.v1 import control_pb2_grpc
from quire.errors import FieldViolation, NoPool

if TYPE_CHECKING:
    from collections.abc import Iterator

    import grpc
    from google.protobuf.duration_pb2 import Duration

    from memory_service.block_manager import BlockManager
    from memory_service.pool_registry import PoolRegistry
    from memory_service.sharing import Outcome, Verdict

_MAX_TIME_TO_LIVE_DAYS: Final = 30
_DAY_S: Final = 24 * 60 * 60
_NS: Final = 1e-9


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    """Implements `quire.memory.v1.ControlService`."""

    def __init__(self, registry: PoolRegistry) -> None:
        self._registry = registry

    @property
    def _manager(self) -> BlockManager:
        return self._registry.pool.manager

    async def SetQuota(
        self,
        request: pb.SetQuotaRequest,
        context: grpc.aio.ServicerContext[pb.SetQuotaRequest, pb.SetQuotaResponse],
    ) -> pb.SetQuotaResponse:
        """Bound a tenant."""
        refuse_tenant(context, "no tenant bounds itself or others")
        raise_if_any(_quota_violations(request))
        manager = self._manager
        manager.sharing.set_quota(
            request.tenant,
            request.soft_quota_blocks if request.HasField("soft_quota_blocks") else None,
            request.hard_quota_blocks if request.HasField("hard_quota_blocks") else None,
        )
        tenant = manager.pool.tenant_as_is(request.tenant)
        return pb.SetQuotaResponse(revision=str(manager.revision), tenant=tenant_message(tenant))

    async def Retain(
        self,
        request: pb.RetainRequest,
        context: grpc.aio.ServicerContext[pb.RetainRequest, pb.RetainResponse],
    ) -> pb.RetainResponse:
        """Keep blocks longer."""
        tenant = tenant_of(context) or NO_TENANT
        raise_if_any(_retain_violations(request))
        manager = self._manager
        expires_at = None
        if request.HasField("time_to_live"):
            expires_at = manager.clock() + _seconds(request.time_to_live)
        outcome = self._retain(manager, tenant, request, expires_at)
        return pb.RetainResponse(
            verdict=_verdict(outcome.verdict),
            reason=outcome.reason,
            retention_id=retention_name(outcome.made_id) if outcome.made_id else "",
            num_blocks=outcome.num_blocks,
            expire_time=timestamp(expires_at) if outcome.made_id else None,
            revision=str(manager.revision),
        )

    def _retain(
        self,
        manager: BlockManager,
        tenant: str,
        request: pb.RetainRequest,
        expires_at: float | None,
    ) -> Outcome:
        sharing, priority = manager.sharing, request.priority
        if request.WhichOneof("subject") == "sequence_id":
            return sharing.retain_sequence(tenant, request.sequence_id, priority, expires_at)
        token_ids = token_array("prefix.token_ids", request.prefix.token_ids, manager)
        return sharing.retain_prefix(tenant, token_ids, priority, expires_at)

    async def Release(
        self,
        request: pb.ReleaseRequest,
        context: grpc.aio.ServicerContext[pb.ReleaseRequest, pb.ReleaseResponse],
    ) -> pb.ReleaseResponse:
        """End a retention."""
        tenant = tenant_of(context) or NO_TENANT
        manager = self._manager
        outcome = manager.sharing.release(tenant, parse_retention(request.retention_id))
        return pb.ReleaseResponse(
            verdict=_verdict(outcome.verdict),
            reason=outcome.reason,
            revision=str(manager.revision),
        )

    async def Flush(
        self,
        request: pb.FlushRequest,
        context: grpc.aio.ServicerContext[pb.FlushRequest, pb.FlushResponse],
    ) -> pb.FlushResponse:
        """Forget cached content, a bounded part at a time, between which steps are answered."""
        tenant = tenant_of(context) or NO_TENANT
        manager = self._manager
        token_ids = np.empty(0, dtype=np.int32)
        if request.token_ids:
            token_ids = token_array("token_ids", request.token_ids, manager)
        plan = manager.sharing.plan_flush(tenant, token_ids)
        num_freed = num_used = 0
        while True:
            outcome = manager.sharing.flush_part(plan)
            num_freed += outcome.num_freed
            num_used += outcome.num_used
            if outcome.is_done:
                return _flushed(num_freed, num_used, manager.revision)
            await asyncio.sleep(0)
            if self._manager is not manager:
                raise NoPool("the pool gave way to another one, in which nothing is cached yet")

    async def PublishPrefix(
        self,
        request: pb.PublishPrefixRequest,
        context: grpc.aio.ServicerContext[pb.PublishPrefixRequest, pb.PublishPrefixResponse],
    ) -> pb.PublishPrefixResponse:
        """Let all tenants share a run of tokens."""
        refuse_tenant(context, "what all tenants share is published for all of them")
        manager = self._manager
        token_ids = token_array("token_ids", request.token_ids, manager)
        raise_if_any([_block_violation(len(token_ids), manager.block_size)])
        outcome = manager.sharing.publish(token_ids)
        return pb.PublishPrefixResponse(
            verdict=_verdict(outcome.verdict),
            reason=outcome.reason,
            prefix_id=prefix_name(outcome.made_id) if outcome.made_id else "",
            num_tokens=outcome.num_blocks,
            revision=str(manager.revision),
        )

    async def WithdrawPrefix(
        self,
        request: pb.WithdrawPrefixRequest,
        context: grpc.aio.ServicerContext[pb.WithdrawPrefixRequest, pb.WithdrawPrefixResponse],
    ) -> pb.WithdrawPrefixResponse:
        """End the sharing of a prefix."""
        refuse_tenant(context, "what all tenants share is withdrawn from all of them")
        manager = self._manager
        outcome = manager.sharing.withdraw(parse_prefix(request.prefix_id))
        return pb.WithdrawPrefixResponse(
            verdict=_verdict(outcome.verdict),
            reason=outcome.reason,
            revision=str(manager.revision),
        )


def _verdict(found: Verdict) -> pb.Verdict.ValueType:
    return pb.Verdict.ValueType(found.value)


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos * _NS


def _quota_violations(request: pb.SetQuotaRequest) -> Iterator[FieldViolation | None]:
    yield name_violation("tenant", request.tenant)
    soft, hard = request.soft_quota_blocks, request.hard_quota_blocks
    if soft < 0:
        yield FieldViolation("soft_quota_blocks", "is below 0")
    if not request.HasField("hard_quota_blocks"):
        return
    if hard < 1:
        yield FieldViolation("hard_quota_blocks", "is below 1; leave it out for no such bound")
    if soft > hard:
        yield FieldViolation("soft_quota_blocks", f"is above hard_quota_blocks {hard}")


def _retain_violations(request: pb.RetainRequest) -> Iterator[FieldViolation]:
    subject = request.WhichOneof("subject")
    if subject is None or (subject == "sequence_id" and not request.sequence_id):
        yield FieldViolation("subject", "is missing: sequence_id or prefix")
    if not 1 <= request.priority <= MAX_PRIORITY:
        yield FieldViolation("priority", f"is not from 1 to {MAX_PRIORITY}")
    if not request.HasField("time_to_live"):
        return
    if not 0 < _seconds(request.time_to_live) <= _MAX_TIME_TO_LIVE_DAYS * _DAY_S:
        description = f"is not above 0 and at most {_MAX_TIME_TO_LIVE_DAYS} days"
        yield FieldViolation("time_to_live", description)


def _block_violation(num_tokens: int, block_size: int) -> FieldViolation | None:
    if num_tokens >= block_size:
        return None
    return FieldViolation("token_ids", f"{num_tokens} do not fill a block of {block_size}")


def _flushed(num_freed: int, num_used: int, revision: int) -> pb.FlushResponse:
    verdict, reason = pb.VERDICT_ACCEPTED, ""
    if num_used:
        verdict = pb.VERDICT_CLIPPED
        reason = f"{num_used} blocks are in use: they are freed with their last holders"
    elif not num_freed:
        verdict, reason = pb.VERDICT_REJECTED, "nothing of this is cached"
    return pb.FlushResponse(
        verdict=verdict,
        reason=reason,
        num_freed_blocks=num_freed,
        num_used_blocks=num_used,
        revision=str(revision),
    )
