"""The compute service's call to the memory service: attaching the pool."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from protos.memory.v1 import pool_pb2, pool_pb2_grpc
from quire.errors import NotReady, QuireError, WriterAlive
from quire.rpc_status import from_rpc_error
from quire.serving import CHANNEL_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.pool_layout import LayerGeometry

_ATTACH_TIMEOUT_S = 60.0
_RETRY_WAIT_S = 0.2
# How long a predecessor that was just killed, or a memory service that just starts, is waited for.
_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class AttachedPool:
    """Where the pool's bytes are."""

    pool_id: str
    num_blocks: int
    writer_generation: int
    ticket: str
    descriptor_socket: str
    size_bytes: int
    warm: bool


@dataclass(frozen=True, slots=True)
class PoolIdentity:
    """What decides whether bytes in a pool are usable."""

    layers: Sequence[LayerGeometry]
    dtype: str
    block_size: int
    model_fingerprint: str


def attach_pool(
    memory_address: str, identity: PoolIdentity, max_model_len: int, *, in_own_memory: bool
) -> AttachedPool:
    """Attach the pool of `identity`; waits for a memory service that starts and for a writer that dies.

    `in_own_memory`: its bytes will lie with this process, not with the memory service.

    Raises:
        QuireError: what the memory service refused, or NotReady when it did not answer.
    """
    request = _attach_request(identity, max_model_len, in_own_memory=in_own_memory)
    deadline = time.monotonic() + _PATIENCE_S
    with grpc.insecure_channel(memory_address, options=CHANNEL_OPTIONS) as channel:
        stub = pool_pb2_grpc.PoolServiceStub(channel)
        while True:
            try:
                return _attached(stub.AttachPool(request, timeout=_ATTACH_TIMEOUT_S))
            except grpc.RpcError as error:
                _wait_or_raise(error, deadline)


def _wait_or_raise(error: grpc.RpcError, deadline: float) -> None:
    cause: QuireError = from_rpc_error(error)
    is_away = error.code() is grpc.StatusCode.UNAVAILABLE
    if time.monotonic() < deadline and (is_away or isinstance(cause, WriterAlive)):
        time.sleep(_RETRY_WAIT_S)
        return
    if is_away:
        message = f"the memory service does not answer: {cause.message}"
        raise NotReady(message) from error
    raise cause from error


def _attach_request(
    identity: PoolIdentity, max_model_len: int, *, in_own_memory: bool
) -> pool_pb2.AttachPoolRequest:
    return pool_pb2.AttachPoolRequest(
        identity=pool_pb2.PoolIdentity(
            layers=[
                pool_pb2.KvLayer(
                    num_kv_heads=layer.num_kv_heads,
                    k_head_dim=layer.k_head_dim,
                    v_head_dim=layer.v_head_dim,
                )
                for layer in identity.layers
            ],
            dtype=identity.dtype,
            block_size=identity.block_size,
            tensor_parallel_rank=0,
            tensor_parallel_size=1,
            model_fingerprint=identity.model_fingerprint,
        ),
        max_model_len=max_model_len,
        placement=pool_pb2.POOL_PLACEMENT_WRITER
        if in_own_memory
        else pool_pb2.POOL_PLACEMENT_SHARED_MEMORY,
    )


def _attached(response: pool_pb2.AttachPoolResponse) -> AttachedPool:
    return AttachedPool(
        pool_id=response.pool_id,
        num_blocks=response.num_blocks,
        writer_generation=response.writer_generation,
        ticket=response.ticket,
        descriptor_socket=response.descriptor_socket,
        size_bytes=response.size_bytes,
        warm=response.warm,
    )
