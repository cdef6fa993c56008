"""Hands the pool's descriptor over a Unix socket, takes back what a writer held, and watches the writer through it."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from memory_service.writer_place import TicketRefused
from memory_service.writer_process import process_at
from quire.descriptor import MAX_LINE_BYTES, OK, peer_pidfd, peer_uid
from quire.serving import UNIX_PREFIX, claim_unix_path, release_unix_path

if TYPE_CHECKING:
    from pathlib import Path

    from memory_service.pool_registry import PoolRegistry

_BACKLOG = 8
_LINE_TIMEOUT_S = 10.0
_GRACE_S = 1.0  # between the end of a socket and the death of a process that cannot be watched

_logger = structlog.get_logger()


class DescriptorServer:
    """Serves tickets. A connection that fetched the descriptor is the writer's sign of life: its end frees the place."""

    def __init__(self, path: Path, registry: PoolRegistry) -> None:
        self.path = path
        self._registry = registry
        self._socket: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Listen; raises StartupError when the path is taken."""
        claim_unix_path(self.path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(self.path))
        self.path.chmod(0o600)
        self._socket.listen(_BACKLOG)
        self._spawn(self._accept(self._socket))

    async def close(self) -> None:
        """End every connection and remove the socket."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
            release_unix_path(f"{UNIX_PREFIX}{self.path}")

    def _spawn(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listening)
            self._spawn(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, TimeoutError):
            refusal = await self._hand_over(connection)
            if refusal is not None:
                await asyncio.get_running_loop().sock_sendall(connection, f"{refusal}\n".encode())

    async def _hand_over(self, connection: socket.socket) -> str | None:
        """Send the descriptor and wait for the end of the writer; or why not."""
        if peer_uid(connection) != os.geteuid():
            return "only processes of the memory service's own user get the descriptor"
        async with asyncio.timeout(_LINE_TIMEOUT_S):
            ticket, held = await _receive(connection)
        try:
            pool, writer = self._registry.redeem(ticket, process_at(connection), held)
        except TicketRefused as refused:
            return str(refused)
        finally:
            if held is not None:
                os.close(held)
        await self._accompany(connection, writer.generation, pool.fd)
        return None

    async def _accompany(self, connection: socket.socket, generation: int, fd: int | None) -> None:
        """Let the writer of `generation` have `fd`, and return when it is dead."""
        pidfd = peer_pidfd(connection)
        try:
            socket.send_fds(connection, [f"{OK}\n".encode()], [] if fd is None else [fd])
            with suppress(OSError):
                while await asyncio.get_running_loop().sock_recv(connection, MAX_LINE_BYTES):
                    pass
            # A socket may end before its process does: nobody else is let in while that one may still write.
            await _until_dead(pidfd)
        finally:
            if pidfd is not None:
                os.close(pidfd)
            self._registry.writer_gone(generation)
            _logger.info("writer_gone", writer_generation=generation)


async def _receive(connection: socket.socket) -> tuple[str, int | None]:
    """The line that the peer sends, and the descriptor that came with it."""
    await _until_readable(connection.fileno())
    line, descriptors, _, _ = socket.recv_fds(
        connection, MAX_LINE_BYTES, 1, socket.MSG_CMSG_CLOEXEC
    )
    return line.decode(errors="replace").strip(), descriptors[0] if descriptors else None


async def _until_dead(pidfd: int | None) -> None:
    """Return once the process of `pidfd` is dead; without one, after a grace time."""
    if pidfd is None:
        await asyncio.sleep(_GRACE_S)
    else:
        await _until_readable(pidfd)


async def _until_readable(fd: int) -> None:
    loop, is_readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, is_readable.set)
    try:
        await is_readable.wait()
    finally:
        loop.remove_reader(fd)
