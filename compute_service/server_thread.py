"""gRPC on a thread of its own, with its own event loop."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from protos.compute.v1 import compute_pb2_grpc
from quire import serving

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    import grpc

    from compute_service.servicer import ComputeServicer

_SERVICE = "quire.compute.v1.ComputeService"
_STOP_GRACE_S = 1.0


class ServerThread:
    """Serves a servicer. All methods are called from the main thread and wait for the loop."""

    def __init__(self, servicer: ComputeServicer, listen: Sequence[str]) -> None:
        self._servicer = servicer
        self._listen = listen
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc", daemon=True)
        self._reporter = serving.HealthReporter()
        self._server: grpc.aio.Server | None = None
        self.addresses: list[str] = []

    def start(self) -> None:
        """Claim the addresses and answer; readiness stays off.

        Raises:
            StartupError: when an address is taken.
        """
        self._thread.start()
        self._run(self._start())

    async def _start(self) -> None:
        self._server = serving.create_server()
        compute_pb2_grpc.add_ComputeServiceServicer_to_server(self._servicer, self._server)
        await self._reporter.add_to(self._server, [_SERVICE])
        self.addresses = [serving.bind(self._server, address) for address in self._listen]
        await self._server.start()

    def set_serving(self, *, serving: bool) -> None:
        """Turn readiness on or off."""
        self._run(self._reporter.set_serving(serving=serving))

    def stop(self) -> None:
        """End the server and the thread; sockets are removed."""
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for address in self.addresses:
            serving.release_unix_path(address)

    async def _stop(self) -> None:
        await self._reporter.set_serving(serving=False)
        if self._server is not None:
            await self._server.stop(_STOP_GRACE_S)

    def _run(self, work: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()
