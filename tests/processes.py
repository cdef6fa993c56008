"""The three services as real processes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from protos.memory.v1 import inspection_pb2_grpc
from protos.router.v1 import router_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

QUIRE = str(Path(sys.executable).with_name("quire"))


@dataclass(frozen=True)
class Quire:
    """Running services and stubs to talk to them."""

    router: router_pb2_grpc.RouterServiceStub
    inspection: inspection_pb2_grpc.InspectionServiceStub
    addresses: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_quire(model: Path, *flags: str) -> Iterator[Quire]:
    """`quire up` with `model`; must end well when it is told to."""
    command = [QUIRE, "up", "--model", str(model), "--listen", f"127.0.0.1:{free_port()}", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
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
                router_pb2_grpc.RouterServiceStub(to_router),
                inspection_pb2_grpc.InspectionServiceStub(to_memory),
                addresses,
            )
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        process.stdout.close()
    assert status == 0
