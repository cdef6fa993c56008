"""The three services as real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ports import claim_ports

from protos.memory.v1 import inspection_pb2, inspection_pb2_grpc
from protos.router.v1 import router_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

QUIRE = str(Path(sys.executable).with_name("quire"))


@dataclass(frozen=True)
class Quire:
    """Running services and stubs to talk to them."""

    process: subprocess.Popen[str]
    router: router_pb2_grpc.RouterServiceStub
    inspection: inspection_pb2_grpc.InspectionServiceStub
    addresses: dict[str, str]


def children_of(quire: Quire) -> dict[str, psutil.Process]:
    """The processes of the services, by the name of their package."""
    found = {}
    for child in psutil.Process(quire.process.pid).children():
        # Killed just now, or not yet what it will be: such a child is none.
        with suppress(psutil.ZombieProcess, psutil.NoSuchProcess, IndexError):
            found[child.cmdline()[2]] = child
    return found


@contextmanager
def suspended_compute(quire: Quire) -> Iterator[None]:
    """Nothing is computed meanwhile: a request that runs at the start still does at the end."""
    compute = children_of(quire)["compute_service"]
    compute.suspend()
    try:
        yield
    finally:
        compute.resume()


def assert_pool_is_idle(quire: Quire) -> None:
    """No used block within ten seconds, and the books agree."""
    deadline = time.monotonic() + 10
    while (pool := quire.inspection.GetPool(inspection_pb2.GetPoolRequest())).num_used_blocks:
        assert time.monotonic() < deadline, f"{pool.num_used_blocks} blocks leaked"
        time.sleep(0.05)
    checked = quire.inspection.CheckIntegrity(inspection_pb2.CheckIntegrityRequest())
    assert list(checked.findings) == []


def free_port() -> int:
    """A free port; those 10 to 12 above it, which `quire up` takes for metrics, are free too."""
    return claim_ports(range(24_000, 32_000, 16), (0, 10, 11, 12))


@contextmanager
def running_quire(model: Path, *flags: str, log: Path | None = None) -> Iterator[Quire]:
    """`quire up` with `model`; must end well when it is told to. What the services log goes to `log`."""
    with log.open("w") if log else nullcontext(None) as stderr:
        yield from _running_quire(model, flags, stderr)


def _running_quire(model: Path, flags: tuple[str, ...], stderr: TextIO | None) -> Iterator[Quire]:
    listen = ("--listen", f"127.0.0.1:{free_port()}")
    command = [QUIRE, "up", "--model", str(model), *listen, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("ready "), line
        addresses = dict(part.split("=", 1) for part in line.split()[1:])
        with (
            grpc.insecure_channel(addresses["router"]) as to_router,
            grpc.insecure_channel(addresses["memory"]) as to_memory,
        ):
            yield Quire(
                process,
                router_pb2_grpc.RouterServiceStub(to_router),
                inspection_pb2_grpc.InspectionServiceStub(to_memory),
                addresses,
            )
    finally:
        if process.poll() is not None:
            pytest.fail(f"quire up ended early with status {process.returncode}")
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        process.stdout.close()
    assert status == 0


def start_service(name: str, *flags: str) -> subprocess.Popen[str]:
    """`quire memory`, `quire compute` or `quire router` alone."""
    # Off: two of the same name would want the same port for their metrics.
    quiet = ("--log-level", "error", "--metrics-listen", "off")
    return subprocess.Popen([QUIRE, name, *quiet, *flags], text=True)


@contextmanager
def running_service(name: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """`quire memory`, `quire compute` or `quire router` alone, told to stop at the end."""
    process = start_service(name, *flags)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def wait_until_serving(channel: grpc.Channel, seconds: float = 60) -> None:
    """Until the health service says that all is well."""
    stub = health_pb2_grpc.HealthStub(channel)
    deadline = time.monotonic() + seconds
    while True:
        with suppress(grpc.RpcError):
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
        assert time.monotonic() < deadline, "the service does not serve"
        time.sleep(0.1)
