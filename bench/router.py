"""What a token costs on its way from the step loop to real gRPC clients.

    python -m bench.router [--streams 256] [--step-ms 5] [--interval-ms 200] [--rounds 3] [--quick]

A real router with a real memory service and a compute service whose steps are over after a fixed time
(`bench.timed_servicer`); clients are grpc.aio stubs in a process of their own, all streams on one TCP connection. Routers
that send tokens as they come and routers that let them run together (`--stream-interval-ms`) take turns; each gets a new
process, sampled by processor time (`bench.sampled_router`): our own Python is what those samples found in functions of
ours, what they call in C (protobuf, the tokenizer) included, gRPC and asyncio excluded. A sample takes microseconds, and
comes a few hundred times a second.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bench.router_rounds import Load, Round, Stage
from bench.running_memory import RunningMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_BLOCKS = 100_000
LIBRARIES = ("grpcio", "protobuf", "tokenizers")
SECONDS, QUICK_SECONDS = 8.0, 1.0
NUM_FUNCTIONS = 12
_TURNS = 5_000_000
console = Console(width=130)


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
        console.print(f"{_name(interval_ms)}, own Python of one: {_own_functions(found[-1])}")
    machine = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    console.print(
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {machine}"
    )


def _pace() -> str:
    """What an elementary thing costs here and now: machines, and neighbours on them, differ by a factor of five."""
    started = time.process_time()
    for _ in range(_TURNS):
        pass
    return f"a turn of a loop takes {(time.process_time() - started) / _TURNS * 1e9:.0f} ns"


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
        "own Python of the router, us a token": f"{median(found.own_us for found in rounds):.1f}",
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
    console.print(f"how fast it is now: {_pace()}")
    with (
        tempfile.TemporaryDirectory() as folder,
        RunningMemory.started(Path(folder), NUM_BLOCKS) as memory,
    ):
        stage = Stage(Path(folder), memory, load)
        for _ in range(num_rounds):
            for interval_ms, found in rounds.items():
                found.append(stage.round(interval_ms))
    show(rounds, load)
    console.print(f"how fast it is then: {_pace()}")


if __name__ == "__main__":
    main()
