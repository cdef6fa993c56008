"""Rounds of the router's benchmark: processes that come and go, and what was seen of them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.router_clients import ClientView

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from bench.running_memory import RunningMemory

_POLL_S, _READY_S = 0.02, 30.0


@dataclass(frozen=True, slots=True)
class Load:
    """What every round does."""

    num_streams: int
    step_ms: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    """Where the router was found: a function and how often."""

    file: str
    function: str
    count: int

    @property
    def is_ours(self) -> bool:
        """Whether we wrote it; `<string>` is the constructors that `dataclasses` made for us."""
        return self.file.startswith(("router/", "quire/")) or self.file == "<string>"


@dataclass(frozen=True, slots=True)
class Round:
    """One router's life."""

    seen: ClientView
    cpu_us: dict[str, float]  # microseconds of processor time a token, by process
    samples: tuple[Sample, ...]

    @property
    def own_us(self) -> float:
        """Microseconds of our own Python a token in the router."""
        ours = sum(found.count for found in self.samples if found.is_ours)
        return self.cpu_us["router"] * ours / max(1, sum(found.count for found in self.samples))


class Stage:
    """What all rounds share: a folder for sockets, a memory service, the load."""

    def __init__(self, folder: Path, memory: RunningMemory, load: Load) -> None:
        self._folder = folder
        self._memory = memory
        self._load = load

    def round(self, interval_ms: float) -> Round:
        """Start compute service and router, let clients read for a while, and end both."""
        with self._compute(), self._router(interval_ms) as (router, address):
            return self._read(router, address)

    @property
    def _compute_address(self) -> str:
        return f"unix:{self._folder}/compute.sock"

    @property
    def _report(self) -> Path:
        return self._folder / "samples.json"

    @contextmanager
    def _compute(self) -> Iterator[None]:
        attached = self._memory.attached
        terms = (attached.pool_id, str(attached.writer_generation), str(self._load.step_ms))
        with _module("bench.timed_servicer", self._compute_address, *terms) as process:
            self._computing = process
            yield

    @contextmanager
    def _router(self, interval_ms: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
        address = f"127.0.0.1:{_free_port()}"
        with _module(
            *("bench.sampled_router", str(self._report), "--listen", address),
            *("--metrics-listen", "off", "--log-level", "warning"),
            *("--memory-address", self._memory.address, "--compute-address", self._compute_address),
            *("--max-num-seqs", str(self._load.num_streams), "--max-num-batched-tokens", "8192"),
            *("--stream-interval-ms", str(interval_ms)),
        ) as process:
            _wait_until_ready(address)
            yield process, address

    def _read(self, router: subprocess.Popen[str], address: str) -> Round:
        load = self._load
        with _module(
            "bench.router_clients", address, str(load.num_streams), str(load.seconds)
        ) as clients:
            assert clients.stdout is not None
            assert clients.stdout.readline() == "begin\n"
            processes: dict[str, subprocess.Popen[Any]] = {
                "router": router,
                "clients": clients,
                "memory": self._memory.process,
                "compute": self._computing,
            }
            before = _cpu_seconds(processes)
            router.send_signal(signal.SIGUSR1)
            assert clients.stdout.readline() == "end\n"
            used = {name: spent - before[name] for name, spent in _cpu_seconds(processes).items()}
            router.send_signal(signal.SIGUSR2)
            seen = ClientView(**json.loads(clients.stdout.readline()))
        cpu_us = {name: spent / seen.num_tokens * 1e6 for name, spent in used.items()}
        return Round(seen, cpu_us, self._samples())

    def _samples(self) -> tuple[Sample, ...]:
        return tuple(Sample(*found) for found in json.loads(self._report.read_text()))


@contextmanager
def _module(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A module of ours as a process, told to end at the end."""
    process = subprocess.Popen(  # noqa: S603 -- ourselves
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(address: str) -> None:
    request = health_pb2.HealthCheckRequest(service="readiness")
    deadline = time.monotonic() + _READY_S
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        while (
            check(request, wait_for_ready=True, timeout=_READY_S).status
            != health_pb2.HealthCheckResponse.SERVING
        ):
            assert time.monotonic() < deadline, "the router finds no engine"
            time.sleep(_POLL_S)


def _cpu_seconds(processes: Mapping[str, subprocess.Popen[Any]]) -> dict[str, float]:
    times = {name: psutil.Process(found.pid).cpu_times() for name, found in processes.items()}
    return {name: found.user + found.system for name, found in times.items()}
