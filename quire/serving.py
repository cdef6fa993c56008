"""What every gRPC server of Quire shares: addresses, health, reflection, clean ends."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from quire.error_interceptor import ErrorInterceptor

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_UNIX_PATH_BYTES = 107
MAX_PORT = 65_535
UNIX_PREFIX = "unix:"
_PR_SET_PDEATHSIG = 1
PROBE_SERVICES = ("", "startup", "liveness", "readiness")

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
_SERVER_OPTIONS = (
    *CHANNEL_OPTIONS,
    # Two servers must never share a port without a word.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


class StartupError(Exception):
    """A process cannot start. The message is one line and is all that the user sees."""


def create_server(*, max_concurrent_rpcs: int | None = None) -> grpc.aio.Server:
    """A server with our limits and error handling; not bound, not started."""
    return grpc.aio.server(
        interceptors=(ErrorInterceptor(),),
        options=_SERVER_OPTIONS,
        maximum_concurrent_rpcs=max_concurrent_rpcs,
    )


def bind(server: grpc.aio.Server, address: str) -> str:
    """Listen on `address` and return it with the port that was given out.

    Args:
        server: a server that was not started.
        address: "host:port" (port 0: any free one) or "unix:/path".

    Raises:
        StartupError: when the address is taken or malformed.
    """
    if address.startswith(UNIX_PREFIX):
        claim_unix_path(Path(address.removeprefix(UNIX_PREFIX)))
    else:
        check_port_is_free(address)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        message = f"cannot listen on {address}: {_last_line(error)}"
        raise StartupError(message) from error
    if address.startswith(UNIX_PREFIX):
        Path(address.removeprefix(UNIX_PREFIX)).chmod(0o600)
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def check_port_is_free(address: str) -> None:
    """Raise `StartupError` in words when "host:port" cannot be listened on: gRPC's own error is a page long."""
    try:
        family, where = resolve(address)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except ValueError as error:
        message = f"cannot listen on {address!r}: write host:port or unix:/path"
        raise StartupError(message) from error
    except OSError as error:
        message = f"cannot listen on {address}: {error.strerror}"
        raise StartupError(message) from error


def resolve(address: str) -> tuple[int, tuple[Any, ...]]:
    """Family and socket address of "host:port".

    Raises:
        ValueError: when it is not of that form, or there is no such port.
        OSError: when there is no such host.
    """
    host, separator, port = address.rpartition(":")
    # The system's own look-up takes a port that is too high modulo 65536.
    if not separator or not port.isdigit() or int(port) > MAX_PORT:
        raise ValueError(address)
    found = socket.getaddrinfo(
        host.strip("[]") or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return found[0][0], found[0][4]


def claim_unix_path(path: Path) -> None:
    """Make `path` free for a new Unix socket: take the lock beside it and remove what a dead owner left.

    gRPC would take the path from a living server without an error. The lock lasts until the process ends.

    Raises:
        StartupError: when the path is too long, its folder is missing, or a living process holds it.
    """
    if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        message = (
            f"socket path {path} has more than {MAX_UNIX_PATH_BYTES} bytes; choose a shorter folder"
        )
        raise StartupError(message)
    try:
        lock = os.open(
            path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600
        )
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"cannot listen on {UNIX_PREFIX}{path}: another process does"
        raise StartupError(message) from error
    except OSError as error:
        message = f"cannot listen on {UNIX_PREFIX}{path}: {error.strerror}"
        raise StartupError(message) from error
    path.unlink(missing_ok=True)


def release_unix_path(address: str) -> None:
    """Remove the socket and the lock file of a Unix address that this process held; others are left alone."""
    if address.startswith(UNIX_PREFIX):
        path = Path(address.removeprefix(UNIX_PREFIX))
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".lock").unlink(missing_ok=True)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


class HealthReporter:
    """`grpc.health.v1` for Kubernetes probes and load balancers, with reflection beside it.

    "liveness" answers SERVING as soon as the server runs, "startup" from `set_started` or the first `set_serving(True)`
    on; "", "readiness" and every service of ours only while `set_serving(True)` holds.
    """

    def __init__(self) -> None:
        self._servicer = health.aio.HealthServicer()
        self._services: tuple[str, ...] = ("", "readiness")

    async def add_to(self, server: grpc.aio.Server, service_names: Iterable[str]) -> None:
        """Register health and reflection on `server` for the full names of its services."""
        names = tuple(service_names)
        self._services = ("", "readiness", *names)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        reflection.enable_server_reflection(
            (*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        answers = health_pb2.HealthCheckResponse
        await self._servicer.set("startup", answers.NOT_SERVING)
        await self._servicer.set("liveness", answers.SERVING)
        await self.set_serving(serving=False)

    async def set_started(self) -> None:
        """Say that all is done that this process could do by itself; from now on a restart helps nobody who waits."""
        await self._servicer.set("startup", health_pb2.HealthCheckResponse.SERVING)

    async def set_serving(self, *, serving: bool) -> None:
        """Say whether calls are welcome."""
        answers = health_pb2.HealthCheckResponse
        status = answers.SERVING if serving else answers.NOT_SERVING
        if serving:
            await self.set_started()
        for name in self._services:
            await self._servicer.set(name, status)


def end_with_parent(parent_pid: int | None) -> None:
    """Have the kernel send SIGTERM to this process when its parent ends, however that ends (Linux; elsewhere nothing).

    The signal comes when the parent's thread that started us ends: the main thread, in `quire up`.
    """
    if parent_pid is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def install_stop_signals(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Set `stop` at SIGTERM and SIGINT. Call it on the main thread, where `loop` runs."""
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def serve_until_stopped(
    server: grpc.aio.Server, reporter: HealthReporter, stop: asyncio.Event, grace_s: float
) -> None:
    """Wait for `stop`, turn readiness off, then let running calls finish for at most `grace_s` seconds."""
    await stop.wait()
    with suppress(asyncio.CancelledError):
        await reporter.set_serving(serving=False)
    await server.stop(grace_s)
