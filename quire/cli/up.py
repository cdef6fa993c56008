"""`quire up`: the three services as child processes, started in order, ended in order."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire.serving import StartupError, check_port_is_free
from quire.settings import UpSettings, load

if TYPE_CHECKING:
    from collections.abc import Sequence

_POLL_S = 0.1
_STOP_GRACE_S = 15.0


@dataclass(slots=True)
class _Children:
    """The running services, in the order of their start."""

    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, module: str, arguments: Sequence[str]) -> None:
        """Start a service; its logs go to our stderr."""
        command = [sys.executable, "-m", module, *arguments]
        # Ctrl-C reaches only this process, which ends the children in order.
        self.running[module] = subprocess.Popen(command, start_new_session=True)  # noqa: S603 -- our own modules

    def ended(self) -> str | None:
        """A service that ended by itself."""
        return next(
            (name for name, child in self.running.items() if child.poll() is not None), None
        )

    def stop(self) -> None:
        """End router, compute, memory; whoever does not end in time is killed."""
        for child in reversed(self.running.values()):
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(_STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def up(argv: Sequence[str]) -> int:
    """Run all three services until SIGTERM, SIGINT or the end of one; the process's exit status."""
    settings = load(UpSettings, argv, prog="quire up")
    try:
        check_port_is_free(settings.listen)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="quire-"))
    children = _Children()
    try:
        return asyncio.run(_run(settings, folder, children))
    finally:
        children.stop()
        shutil.rmtree(folder, ignore_errors=True)


async def _run(settings: UpSettings, folder: Path, children: _Children) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    addresses = {
        "router": settings.listen,
        "memory": f"unix:{folder / 'memory.sock'}",
        "compute": f"unix:{folder / 'compute.sock'}",
    }
    _start(settings, folder, addresses, children)
    if not await _wait_until_ready(addresses["router"], stop, children):
        return _ended(children)
    print("ready", *(f"{name}={address}" for name, address in addresses.items()), flush=True)
    while not stop.is_set() and children.ended() is None:  # noqa: ASYNC110 -- children end without an event
        await asyncio.sleep(_POLL_S)
    return _ended(children)


def _ended(children: _Children) -> int:
    name = children.ended()
    if name is None:
        return 0
    status = children.running[name].returncode
    print(f"error: {name} ended with status {status}", file=sys.stderr)
    return 1


def _start(
    settings: UpSettings, folder: Path, addresses: dict[str, str], children: _Children
) -> None:
    logs: dict[str, str] = {"log_level": settings.log_level, "log_format": settings.log_format}
    children.start(
        "memory_service",
        _flags(
            logs,
            listen=addresses["memory"],
            descriptor_socket=folder / "descriptor.sock",
            memory_budget=int(settings.memory_budget),
            state_dir=settings.state_dir,
            prefix_cache=settings.prefix_cache,
        ),
    )
    children.start(
        "compute_service",
        _flags(
            logs,
            listen=addresses["compute"],
            memory_address=addresses["memory"],
            model=settings.model,
            dtype=settings.dtype,
            block_size=settings.block_size,
            max_model_len=settings.max_model_len,
            num_threads=settings.num_threads,
            trust_remote_code=settings.trust_remote_code,
        ),
    )
    children.start(
        "router",
        _flags(
            logs,
            listen=addresses["router"],
            memory_address=addresses["memory"],
            compute_address=addresses["compute"],
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            watermark=settings.watermark,
            queue_limit=settings.queue_limit,
            served_model_name=settings.served_model_name,
        ),
    )


def _flags(logs: dict[str, str], **settings: object) -> list[str]:
    flags: list[str] = []
    for name, value in {**logs, **settings}.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return flags


async def _wait_until_ready(address: str, stop: asyncio.Event, children: _Children) -> bool:
    """Ask the router's health until it serves; False when something ended first."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while not stop.is_set() and children.ended() is None:
            try:
                answer = await stub.Check(  # type: ignore[attr-defined]
                    health_pb2.HealthCheckRequest(service="readiness"), timeout=1
                )
            except grpc.aio.AioRpcError:
                await asyncio.sleep(_POLL_S)
                continue
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return True
            await asyncio.sleep(_POLL_S)
    return False
