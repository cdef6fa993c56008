"""What a token costs on its way from the step loop to real gRPC clients.

    python -m bench.router [--streams 256] [--step-ms 5] [--interval-ms 200] [--rounds 3] [--quick]

A real router with a real memory service and a compute service whose steps are over after a fixed time
(`bench.timed_servicer`); clients are grpc.aio stubs in a process of their own, all streams on one TCP connection. Routers
that send tokens as they come and routers that let them run together (`--stream-interval-ms`) take turns; each gets a new
process. The last round of each is sampled by processor time (`bench.sampled_router`): our own Python is what those
samples found in functions of ours, what they call in C (protobuf, the tokenizer) included, gRPC and asyncio excluded.
Sampling does not slow the router down by more than a hundredth, so that round counts like the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

from bench.router_clients import ClientView
from bench.running_memory import RunningMemory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

NUM_BLOCKS = 100_000
LIBRARIES = ("grpcio", "protobuf", "tokenizers")
SECONDS, QUICK_SECONDS = 8.0, 1.0
NUM_FUNCTIONS = 12
_POLL_S, _READY_S = 0.02, 30.0
console = Console(width=130)


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

    def round(self, interval_ms: float, *, sampled: bool) -> Round:
        """Start compute service and router, let clients read for a while, and end both."""
        with self._compute(), self._router(interval_ms, sampled=sampled) as (router, address):
            return self._read(router, address, sampled=sampled)

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
    def _router(
        self, interval_ms: float, *, sampled: bool
    ) -> Iterator[tuple[subprocess.Popen[str], str]]:
        module = ("bench.sampled_router", str(self._report)) if sampled else ("router",)
        address = f"127.0.0.1:{_free_port()}"
        with _module(
            *(*module, "--listen", address, "--metrics-listen", "off", "--log-level", "warning"),
            *("--memory-address", self._memory.address, "--compute-address", self._compute_address),
            *("--max-num-seqs", str(self._load.num_streams), "--max-num-batched-tokens", "8192"),
            *("--stream-interval-ms", str(interval_ms)),
        ) as process:
            _wait_until_ready(address)
            yield process, address

    def _read(self, router: subprocess.Popen[str], address: str, *, sampled: bool) -> Round:
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
            if sampled:
                router.send_signal(signal.SIGUSR1)
            assert clients.stdout.readline() == "end\n"
            used = {name: spent - before[name] for name, spent in _cpu_seconds(processes).items()}
            if sampled:
                router.send_signal(signal.SIGUSR2)
            seen = ClientView(**json.loads(clients.stdout.readline()))
        cpu_us = {name: spent / seen.num_tokens * 1e6 for name, spent in used.items()}
        return Round(seen, cpu_us, self._samples() if sampled else ())

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


def show(rounds: dict[float, list[Round]], load: Load) -> None:
    """Print the table of medians, and where our own time goes."""
    table = Table(
        title=f"{load.num_streams} streams, steps of {load.step_ms:g} ms on the device; medians"
    )
    for heading in ("", *(_name(interval_ms) for interval_ms in rounds)):
        table.add_column(heading, justify="right" if heading else "left")
    columns = [_figures(found) for found in rounds.values()]
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    console.print(table)
    for interval_ms, found in rounds.items():
        console.print(f"{_name(interval_ms)}, own Python: {_own_functions(found[-1])}")
    machine = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    console.print(
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {machine}"
    )


def _name(interval_ms: float) -> str:
    return f"together, {interval_ms:g} ms" if interval_ms else "as they come"


def _figures(rounds: Sequence[Round]) -> dict[str, str]:
    seen = [found.seen for found in rounds]
    return {
        "tokens/s": f"{median(view.num_tokens / view.seconds for view in seen):,.0f}",
        "messages/s": f"{median(view.num_messages / view.seconds for view in seen):,.0f}",
        "tokens a message": f"{median(view.num_tokens / view.num_messages for view in seen):.1f}",
        **{
            f"processor, us a token: {name}": f"{median(found.cpu_us[name] for found in rounds):.1f}"
            for name in rounds[0].cpu_us
        },
        "own Python of the router, us a token": f"{rounds[-1].own_us:.1f}",
        "TTFT p50 / p99, ms": _spread([view.ttft_ms for view in seen]),
        "between messages p50 / p99, ms": _spread([view.gap_ms for view in seen]),
        "ITL (mean a stream), ms": f"{median(view.itl_ms for view in seen):.1f}",
    }


def _spread(found: Sequence[tuple[float, float]]) -> str:
    middle, high = (median(values) for values in zip(*found, strict=True))
    return f"{middle:,.0f} / {high:,.0f}"


def _own_functions(found: Round) -> str:
    ours = sorted((s for s in found.samples if s.is_ours), key=lambda s: -s.count)
    a_sample = found.own_us / max(1, sum(s.count for s in ours))
    return ", ".join(f"{s.function} {s.count * a_sample:.2f}" for s in ours[:NUM_FUNCTIONS])


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--interval-ms", type=float, default=200.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few streams for a moment")
    asked = parser.parse_args()
    load = Load(asked.streams, asked.step_ms, SECONDS)
    num_rounds = asked.rounds
    if asked.quick:
        load, num_rounds = Load(8, asked.step_ms, QUICK_SECONDS), 1
    rounds: dict[float, list[Round]] = {asked.interval_ms: [], 0.0: []}
    with (
        tempfile.TemporaryDirectory() as folder,
        RunningMemory.started(Path(folder), NUM_BLOCKS) as memory,
    ):
        stage = Stage(Path(folder), memory, load)
        for number in range(num_rounds):
            for interval_ms, found in rounds.items():
                found.append(stage.round(interval_ms, sampled=number == num_rounds - 1))
    show(rounds, load)


if __name__ == "__main__":
    main()
