"""A bidirectional stream on which answers come in the order of the requests."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from quire.errors import NotReady, QuireError
from quire.rpc_status import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import Callable

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class StreamLost(Exception):
    """The stream ended; `cause` says why."""

    def __init__(self, name: str, cause: QuireError) -> None:
        super().__init__(f"{name}: {cause.message}")
        self.cause = cause


class OrderedStream(Generic[RequestT, ResponseT]):
    """Several requests may be in flight.

    One task reads for the stream's whole life: a read that is cancelled by a time limit would cancel the call.
    """

    def __init__(self, name: str, open_call: Callable[[], Any]) -> None:
        self._name = name
        self._call = open_call()
        self._waiting: deque[asyncio.Future[ResponseT]] = deque()
        self._lost: StreamLost | None = None
        self._writing = asyncio.Lock()  # gRPC takes one message at a time
        self._reader = asyncio.create_task(self._read())

    async def ask(self, request: RequestT) -> ResponseT:
        """Send `request` and wait for its answer.

        Raises:
            StreamLost: when the stream ends first.
        """
        if self._lost is not None:
            raise self._lost
        answer: asyncio.Future[ResponseT] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        try:
            # When the write fails the reader learns the status and fails all who wait.
            with suppress(grpc.RpcError, asyncio.InvalidStateError):
                async with self._writing:
                    await self._call.write(request)
            return await answer
        finally:
            # Whoever was cancelled does not hear how it ends; that is no error that nobody looked at.
            if not answer.cancel() and not answer.cancelled():
                answer.exception()

    async def close(self, last: RequestT | None = None) -> None:
        """Send `last`, half-close, and wait for the other side to end the stream."""
        with suppress(grpc.RpcError, asyncio.InvalidStateError):
            if last is not None:
                await self._call.write(last)
            await self._call.done_writing()
        await self._reader

    def cancel(self) -> None:
        """Break the stream."""
        self._call.cancel()

    async def _read(self) -> None:
        cause: QuireError = NotReady("the stream ended")
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                answer = self._waiting.popleft()
                if not answer.done():  # whoever asked may have been cancelled at shutdown
                    answer.set_result(response)
            if await self._call.code() is not grpc.StatusCode.OK:
                cause = NotReady(await self._call.details() or "the stream failed")
        except grpc.RpcError as error:
            cause = from_rpc_error(error)
        except asyncio.CancelledError:
            cause = NotReady("the stream was cancelled")
        self._fail(StreamLost(self._name, cause))

    def _fail(self, lost: StreamLost) -> None:
        self._lost = lost
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(lost)
        self._waiting.clear()
