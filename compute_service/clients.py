"""The compute service's calls to the memory service: attaching the pool, and staying attached."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from protos.memory.v1 import pool_pb2, pool_pb2_grpc
from quire.descriptor import DescriptorRefusedError
from quire.errors import NotReady, QuireError, WriterAlive
from quire.rpc_status import from_rpc_error
from quire.serving import CHANNEL_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from quire.pool_layout import LayerGeometry

_ATTACH_TIMEOUT_S = 60.0
_RESUME_TIMEOUT_S = 10.0
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


class PoolClient:
    """Attaches one pool, and goes on with it after a restart of the memory service.

    Args:
        memory_address: of the memory service.
        identity: of the pool.
        max_model_len: longest sequence that will be served, in tokens.
        in_own_memory: the bytes will lie with this process, not with the memory service.
    """

    def __init__(
        self,
        memory_address: str,
        identity: PoolIdentity,
        max_model_len: int,
        *,
        in_own_memory: bool,
    ) -> None:
        self._address = memory_address
        self._request = _attach_request(identity, max_model_len, in_own_memory=in_own_memory)

    def attach(self) -> AttachedPool:
        """Become the writer; waits for a memory service that starts and for a writer that dies.

        Raises:
            QuireError: what the memory service refused, or NotReady when it did not answer.
        """
        deadline = time.monotonic() + _PATIENCE_S
        with self._channel() as channel:
            stub = pool_pb2_grpc.PoolServiceStub(channel)
            while True:
                try:
                    return _attached(stub.AttachPool(self._request, timeout=_ATTACH_TIMEOUT_S))
                except grpc.RpcError as error:
                    _wait_or_raise(error, deadline)

    def resume(
        self, attached: AttachedPool, take: Callable[[AttachedPool], None], patience_s: float
    ) -> None:
        """Stay the writer of `attached`; waits `patience_s` seconds for a memory service that starts again.

        `take` is called with what it answered, and again after the next answer when it raises DescriptorRefusedError.

        Raises:
            QuireError: PoolMismatch when the pool is lost, or NotReady when it did not answer.
            DescriptorRefusedError: what `take` raised last.
        """
        request = pool_pb2.AttachPoolRequest()
        request.CopyFrom(self._request)
        request.resumption.pool_id = attached.pool_id
        request.resumption.writer_generation = attached.writer_generation
        deadline = time.monotonic() + patience_s
        with self._channel() as channel:
            stub = pool_pb2_grpc.PoolServiceStub(channel)
            while True:
                try:
                    take(_attached(stub.AttachPool(request, timeout=_RESUME_TIMEOUT_S)))
                except grpc.RpcError as error:
                    _wait_or_raise(error, deadline)
                except DescriptorRefusedError:
                    # It may have ended once more in between.
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(_RETRY_WAIT_S)
                else:
                    return

    def _channel(self) -> grpc.Channel:
        options = (
            *CHANNEL_OPTIONS,
            # A service that restarts is looked for again at once, not after gRPC's two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
        )
        return grpc.insecure_channel(self._address, options=options)


def _wait_or_raise(error: grpc.RpcError, deadline: float) -> None:
    cause: QuireError = from_rpc_error(error)
    is_away = error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
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
