"""A memory service as a process, with this process as its compute service and its router."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.memory.v1 import memory_pb2 as pb
from protos.memory.v1 import memory_pb2_grpc, pool_pb2, pool_pb2_grpc
from quire.descriptor import PoolDescriptor, fetch_descriptor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

_QUIRE = str(Path(sys.executable).with_name("quire"))
_POLL_S = 0.005
BLOCK_SIZE = 16
# One layer of one head of one element: what the pool's bytes are does not matter to its books.
_BLOCK_BYTES = BLOCK_SIZE * 2 * 4


@dataclass(slots=True)
class MemorySession:
    """A session's stream, as the router has it."""

    generation: int
    call: grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]

    async def ask(self, request: pb.SessionRequest) -> pb.SessionResponse:
        """Send and wait for the answer."""
        await self.call.write(request)
        answer = await self.call.read()
        assert isinstance(answer, pb.SessionResponse)
        return answer


@dataclass(slots=True)
class RunningMemory:
    """The process and what is attached to it."""

    folder: Path
    num_blocks: int
    process: subprocess.Popen[bytes] = field(init=False)
    attached: pool_pb2.AttachPoolResponse = field(init=False)
    descriptor: PoolDescriptor | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"unix:{self.folder}/memory.sock"

    @classmethod
    @contextmanager
    def started(cls, folder: Path, num_blocks: int) -> Iterator[Self]:
        """Serving, with a pool of `num_blocks` that this process writes to."""
        memory = cls(folder, num_blocks)
        memory.start()
        try:
            memory.attach()
            yield memory
        finally:
            if memory.descriptor is not None:
                memory.descriptor.close()
            memory.process.send_signal(signal.SIGTERM)
            memory.process.wait(30)

    def start(self) -> float:
        """Start the process and wait until it serves; seconds that took."""
        started = time.monotonic()
        self.process = subprocess.Popen(  # noqa: S603 -- our own program
            [
                *(_QUIRE, "memory", "--listen", self.address, "--metrics-listen", "off"),
                *("--descriptor-socket", f"{self.folder}/descriptor.sock"),
                *("--state-dir", f"{self.folder}/state", "--log-level", "warning"),
                # Layouts begin each array at a page.
                *("--memory-budget", str(self.num_blocks * _BLOCK_BYTES + (1 << 14))),
            ]
        )
        with grpc.insecure_channel(
            self.address,
            options=(
                ("grpc.initial_reconnect_backoff_ms", 10),
                ("grpc.max_reconnect_backoff_ms", 20),
            ),
        ) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                assert self.process.poll() is None
                with suppress(grpc.RpcError):
                    found = stub.Check(  # type: ignore[attr-defined]
                        health_pb2.HealthCheckRequest(service="readiness"), timeout=1
                    )
                    if found.status == health_pb2.HealthCheckResponse.SERVING:
                        return time.monotonic() - started
                time.sleep(_POLL_S)

    def attach(self, resumption: pool_pb2.PoolResumption | None = None) -> None:
        """Become the writer, or go on as the one that this process was."""
        request = pool_pb2.AttachPoolRequest(
            identity=pool_pb2.PoolIdentity(
                layers=[pool_pb2.KvLayer(num_kv_heads=1, k_head_dim=1, v_head_dim=1)],
                dtype="float32",
                block_size=BLOCK_SIZE,
                tensor_parallel_size=1,
                model_fingerprint="bench",
            ),
            max_model_len=64,
            resumption=resumption,
        )
        with grpc.insecure_channel(self.address) as channel:
            self.attached = pool_pb2_grpc.PoolServiceStub(channel).AttachPool(request, timeout=60)
        self.descriptor = fetch_descriptor(self.attached.descriptor_socket, self.attached.ticket)

    @asynccontextmanager
    async def session(self, max_num_rows: int) -> AsyncIterator[MemorySession]:
        """A session that ends with a goodbye."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            call = memory_pb2_grpc.MemoryServiceStub(channel).Session()
            session = MemorySession(0, call)
            hello = pb.SessionHello(
                session_id="bench",
                pool_id=self.attached.pool_id,
                writer_generation=self.attached.writer_generation,
                max_num_rows=max_num_rows,
            )
            welcome = await session.ask(pb.SessionRequest(hello=hello))
            session.generation = welcome.welcome.generation
            yield session
            await call.write(pb.SessionRequest(goodbye=pb.SessionGoodbye()))
            await call.read()
