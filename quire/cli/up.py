"""`quire up`: the three services as child processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire import logs
from quire.cli.ports import metrics_addresses, router_address
from quire.run_folder import make_run_folder
from quire.serving import UNIX_PREFIX, StartupError, install_stop_signals
from quire.settings import (
    OFF,
    ComputeSettings,
    MemorySettings,
    RouterSettings,
    ServiceSettings,
    UpSettings,
)
from quire.settings_loader import CONFIG_VARIABLE, load
from quire.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_POLL_S = 0.1
_KILL_GRACE_S = 5.0


def up(argv: Sequence[str]) -> int:
    """Run all three services until SIGTERM or SIGINT; the process's exit status."""
    settings = load(UpSettings, argv, prog="quire up")
    logs.configure(settings.log_level, settings.log_format, "up")
    try:
        router = router_address(settings.listen)
        metrics = metrics_addresses(settings.listen) if settings.metrics else {}
        folder = make_run_folder(router)
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # The children get every setting as a flag; the file is ours, with keys that a single service does not know.
    environment = {key: value for key, value in os.environ.items() if key != CONFIG_VARIABLE}
    supervisor = Supervisor(environment, settings.shutdown_grace_s + _KILL_GRACE_S)
    addresses = {
        "router": router,
        "memory": f"{UNIX_PREFIX}{folder / 'memory.sock'}",
        "compute": f"{UNIX_PREFIX}{folder / 'compute.sock'}",
        **{f"{name}_metrics": address for name, address in metrics.items()},
    }
    try:
        return asyncio.run(_run(settings, folder, addresses, supervisor))
    finally:
        supervisor.stop()
        shutil.rmtree(folder, ignore_errors=True)


async def _run(
    settings: UpSettings, folder: Path, addresses: dict[str, str], supervisor: Supervisor
) -> int:
    stop = asyncio.Event()
    install_stop_signals(asyncio.get_running_loop(), stop)
    _start(settings, folder, addresses, supervisor)
    why = await _wait_until_ready(addresses["router"], stop, supervisor)
    if why is None and not stop.is_set():
        print("ready", *(f"{name}={address}" for name, address in addresses.items()), flush=True)
        why = await _watch(stop, supervisor)
    if why is None:
        return 0
    # A service that ends with status 1 has said why.
    if not why.endswith(" ended with status 1"):
        print(f"error: {why}", file=sys.stderr)
    return 1


async def _watch(stop: asyncio.Event, supervisor: Supervisor) -> str | None:
    """Keep the children running until `stop`; why that cannot be done, in words, or None."""
    while not stop.is_set():
        why = supervisor.restart_ended()
        if why is not None:
            return why
        await asyncio.sleep(_POLL_S)
    return None


def _start(
    settings: UpSettings, folder: Path, addresses: dict[str, str], supervisor: Supervisor
) -> None:
    memory, compute = addresses["memory"], addresses["compute"]
    descriptor_socket = folder / "descriptor.sock"
    supervisor.start(
        "memory_service",
        _flags(
            settings,
            MemorySettings,
            listen=memory,
            descriptor_socket=descriptor_socket,
            metrics_listen=addresses.get("memory_metrics", OFF),
        ),
        # Without a state folder the pool is lost with it, which a restart would only hide.
        may_restart=settings.state_dir is not None,
    )
    supervisor.start(
        "compute_service",
        _flags(
            settings,
            ComputeSettings,
            listen=compute,
            memory_address=memory,
            metrics_listen=addresses.get("compute_metrics", OFF),
        ),
        may_restart=True,
    )
    supervisor.start(
        "router",
        _flags(
            settings,
            RouterSettings,
            listen=addresses["router"],
            memory_address=memory,
            compute_address=compute,
            metrics_listen=addresses.get("router_metrics", OFF),
        ),
        may_restart=True,
    )


def _flags(settings: UpSettings, cls: type[ServiceSettings], **own: object) -> list[str]:
    """Flags of a service: what `quire up` was told of its settings, and its own addresses."""
    shared = cls.model_fields.keys() & UpSettings.model_fields.keys() - {"parent_pid"}
    flags: list[str] = []
    for name, value in ({name: getattr(settings, name) for name in sorted(shared)} | own).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            # ByteSize prints in rounded units.
            flags += [f"--{flag}", str(int(value) if isinstance(value, int) else value)]
    return flags


async def _wait_until_ready(
    address: str, stop: asyncio.Event, supervisor: Supervisor
) -> str | None:
    """Ask the router's health until it serves or `stop` is set; why something ended first, in words, or None."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while not stop.is_set() and (why := supervisor.ended()) is None:
            try:
                answer = await stub.Check(  # type: ignore[attr-defined]
                    health_pb2.HealthCheckRequest(service="readiness"), timeout=1
                )
            except grpc.aio.AioRpcError:
                await asyncio.sleep(_POLL_S)
                continue
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return None
            await asyncio.sleep(_POLL_S)
        return why if not stop.is_set() else None
