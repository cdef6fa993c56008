"""The gRPC face of the memory service: sessions and attaching. `memory_service.inspection` shows the pool."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import structlog

from memory_service.demand import Admit, Fork, StepDemand
from memory_service.identity_codec import identity_of
from memory_service.record import ReleaseReason
from protos.common.v1 import block_pb2
from protos.memory.v1 import memory_pb2, memory_pb2_grpc, pool_pb2, pool_pb2_grpc
from quire.errors import BrokenContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    import grpc

    from memory_service import session
    from memory_service.demand import IntArray, StepAnswer
    from memory_service.explanations import Explanations
    from memory_service.metrics import StepTally
    from memory_service.pool import Attachment
    from memory_service.pool_registry import PoolRegistry
    from memory_service.sessions import Sessions

_INT32 = np.dtype("<i4")

_logger = structlog.get_logger()


class PoolServicer(pool_pb2_grpc.PoolServiceServicer):
    """Implements `quire.memory.v1.PoolService`."""

    def __init__(self, registry: PoolRegistry, descriptor_socket: str) -> None:
        self._registry = registry
        self._descriptor_socket = descriptor_socket

    async def AttachPool(
        self,
        request: pool_pb2.AttachPoolRequest,
        context: grpc.aio.ServicerContext[pool_pb2.AttachPoolRequest, pool_pb2.AttachPoolResponse],
    ) -> pool_pb2.AttachPoolResponse:
        """Let a writer in, or let it go on."""
        attachment, event = self._attach(request)
        pool = attachment.pool
        _logger.info(
            event,
            pool_id=pool.pool_id,
            num_blocks=pool.manager.pool.num_blocks,
            size_bytes=pool.size_bytes,
            writer_generation=attachment.writer_generation,
        )
        return pool_pb2.AttachPoolResponse(
            pool_id=pool.pool_id,
            num_blocks=pool.manager.pool.num_blocks,
            writer_generation=attachment.writer_generation,
            ticket=attachment.ticket,
            descriptor_socket=self._descriptor_socket,
            warm=attachment.is_warm,
            size_bytes=pool.size_bytes,
        )

    def _attach(self, request: pool_pb2.AttachPoolRequest) -> tuple[Attachment, str]:
        """What the writer is told, and what the log says of it."""
        identity = identity_of(request.identity)
        if request.HasField("resumption"):
            before = request.resumption
            resumed = self._registry.resume(identity, before.pool_id, before.writer_generation)
            return resumed, "pool_resumed"
        attachment = self._registry.attach(
            identity,
            request.max_model_len,
            in_writers_memory=request.placement == pool_pb2.POOL_PLACEMENT_WRITER,
        )
        return attachment, "pool_attached" if attachment.is_warm else "pool_created"


class MemoryServicer(memory_pb2_grpc.MemoryServiceServicer):
    """Implements `quire.memory.v1.MemoryService`."""

    def __init__(
        self,
        registry: PoolRegistry,
        sessions: Sessions,
        tally: StepTally,
        explanations: Explanations,
    ) -> None:
        self._registry = registry
        self._sessions = sessions
        self._tally = tally
        self._explanations = explanations

    async def Session(
        self,
        request_iterator: AsyncIterator[memory_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[memory_pb2.SessionRequest, memory_pb2.SessionResponse],
    ) -> AsyncIterator[memory_pb2.SessionResponse]:
        """Carry one session's steps."""
        first = await anext(aiter(request_iterator), None)
        if first is None:
            return
        if first.WhichOneof("message") != "hello":
            raise BrokenContract("the first message of a stream is hello")
        hello = first.hello
        opened = self._sessions.open(
            hello.session_id, hello.pool_id, hello.writer_generation, hello.max_num_rows
        )
        generation = opened.generation
        try:
            yield memory_pb2.SessionResponse(welcome=self._welcome(opened))
            async for message in request_iterator:
                kind = message.WhichOneof("message")
                if kind == "goodbye":
                    self._sessions.end(opened, generation)
                    return
                if kind != "step":
                    raise BrokenContract("every message after hello is a step or goodbye")
                yield self._answer_step(opened, message.step)
        finally:
            self._sessions.detach(opened, generation)

    def _answer_step(
        self, opened: session.Session, step: memory_pb2.AllocateStep
    ) -> memory_pb2.SessionResponse:
        started = time.perf_counter()
        answer = self._sessions.apply(opened, step.generation, _demand(step))
        self._explanations.answered(opened.key, answer)
        response = memory_pb2.SessionResponse(answer=_answer(answer, step.generation))
        self._tally.answered(answer, len(step.admits), time.perf_counter() - started)
        return response

    def _welcome(self, opened: session.Session) -> memory_pb2.SessionWelcome:
        manager = self._registry.pool.manager
        table = manager.table(opened.key)
        return memory_pb2.SessionWelcome(
            generation=opened.generation,
            last_applied_step=opened.last_applied_step,
            block_size=manager.block_size,
            num_blocks=manager.pool.num_blocks,
            sequences=[
                memory_pb2.SessionSequence(
                    row=row,
                    incarnation=found.incarnation,
                    sequence_id=found.sequence_id,
                    num_computed_tokens=int(table.num_computed[row]),
                    block_table=_pack(table.block_table(row)),
                )
                for row, found in table.items()
            ],
            prefix_cache_enabled=manager.prefix_cache_enabled,
        )


def _demand(step: memory_pb2.AllocateStep) -> StepDemand:
    return StepDemand(
        step=step.step,
        acknowledged_step=step.acknowledged_step,
        commit_rows=_ints(step.commit_rows),
        commit_num_computed_tokens=_ints(step.commit_num_computed_tokens),
        commit_token_ids=_unpack(step.commit_token_ids),
        releases=tuple(step.release_rows),
        release_reasons=tuple(_release_reason(found) for found in step.release_reasons),
        forks=tuple(
            Fork(
                found.src_row,
                found.dst_row,
                found.dst_incarnation,
                found.sequence_id,
                found.request_id,
                found.num_tokens,
            )
            for found in step.forks
        ),
        extend_rows=_ints(step.extend_rows),
        extend_starts=_ints(step.extend_starts),
        extend_num_tokens=_ints(step.extend_num_tokens),
        admits=tuple(
            Admit(
                found.row,
                found.incarnation,
                found.sequence_id,
                found.request_id,
                _unpack(found.token_ids),
                found.num_sequences,
                found.tenant,
            )
            for found in step.admits
        ),
        admit_token_budget=step.admit_token_budget,
        watermark_blocks=step.watermark_blocks,
    )


def _release_reason(reason: memory_pb2.ReleaseReason.ValueType) -> ReleaseReason:
    """A reason that this version does not know was not said: it changes nothing but what Explain tells."""
    is_known = reason in memory_pb2.ReleaseReason.values()
    return ReleaseReason(reason) if is_known else ReleaseReason.UNSPECIFIED


def _answer(answer: StepAnswer, generation: int) -> memory_pb2.AllocateAnswer:
    return memory_pb2.AllocateAnswer(
        generation=generation,
        step=answer.step,
        admissions=[
            memory_pb2.Admission(
                row=found.row,
                num_cached_tokens=found.num_cached_tokens,
                num_scheduled_tokens=found.num_scheduled_tokens,
                block_table=_pack(found.block_table),
            )
            for found in answer.admissions
        ],
        new_block_rows=[row for row, _ in answer.new_blocks],
        new_block_ids=[block_id for _, block_id in answer.new_blocks],
        forked_tables=[
            memory_pb2.ForkedTable(row=row, block_table=_pack(table))
            for row, table in answer.forked_tables
        ],
        copies=[
            block_pb2.BlockCopy(src_block_id=src, dst_block_id=dst) for src, dst in answer.copies
        ],
        remap_rows=[row for row, _, _ in answer.remaps],
        remap_indexes=[index for _, index, _ in answer.remaps],
        remap_block_ids=[block_id for _, _, block_id in answer.remaps],
        refusals=[
            memory_pb2.Refusal(row=row, reason=memory_pb2.RefusalReason.ValueType(reason.value))
            for row, reason in answer.refusals
        ],
        num_available_blocks=answer.num_available_blocks,
    )


def _ints(values: Iterable[int]) -> IntArray:
    return np.array(values, dtype=np.int32)


def _pack(values: IntArray) -> bytes:
    return values.astype(_INT32).tobytes()


def _unpack(packed: bytes) -> IntArray:
    if len(packed) % _INT32.itemsize:
        raise BrokenContract("packed int32 of a length that is not a multiple of 4")
    return np.frombuffer(packed, dtype=_INT32)
