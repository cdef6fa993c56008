"""Quire beside OpenVINO GenAI, llama.cpp and transformers: one random checkpoint, the same prompts, in turns.

    python -m bench.peers [--shape 0.5b] [--peers openvino llama.cpp ...] [--workloads 1 16 ...] [--rounds 3]

Each engine is a process of its own, in an environment that is made at first use (llama.cpp is compiled for this CPU:
ten minutes), and all but one are idle. Quire is `quire up` with streams of gRPC clients. Greedy; output lengths fixed. A
round runs every workload on every engine; rounds go on while the minutes last. What an engine cannot do within the
cap is printed as such, and not tried again.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from transformers import logging

from bench.peer_engines.checkpoint import SHAPES, make_checkpoint
from bench.peer_engines.engine_process import ROOT, EngineFailed, EngineProcess
from bench.peer_engines.engines import ENGINES
from bench.peer_engines.findings import Cell, Run, ratio
from bench.peer_engines.other_load import OtherLoad
from bench.peer_engines.workloads import WORKLOADS, Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

QUICK_PEERS = ["generate"]  # what needs no environment besides ours
console = Console(width=160)


@dataclass
class Comparison:
    """Engines that take turns."""

    engines: dict[str, EngineProcess]
    vocab_size: int
    cap_s: float
    end: float  # monotonic: no run goes on longer
    cells: dict[tuple[str, str], Cell] = field(default_factory=lambda: defaultdict(Cell))
    others: OtherLoad = field(default_factory=OtherLoad)

    def run_round(self, number: int, workloads: Sequence[Workload]) -> None:
        """Every workload, on one engine after the other; every other round the other way round."""
        for workload in workloads:
            for name in list(self.engines)[:: -1 if number % 2 else 1]:
                cell = self.cells[workload.name, name]
                if not cell.problem and time.monotonic() < self.end:
                    with console.status(f"round {number + 1}: {workload.title}, {name}"):
                        self._run(cell, workload, name, number)
                    # A round may take longer than whoever watches has patience.
                    console.log(f"{workload.title}, {name}: {cell.last()}")

    def _run(self, cell: Cell, workload: Workload, name: str, number: int) -> None:
        engine, cap_s = self.engines[name], self.cap_s * ENGINES[name].cap_share
        requests = workload.requests(number, self.vocab_size)
        engine.ensure_running()
        limit_s = min(cap_s, self.end - time.monotonic())
        try:
            with self.others.beside(engine):
                times = engine.run(requests, limit_s)
            cell.runs[number] = Run.of(requests, times)
        except TimeoutError:
            cell.problem = f"not done in {limit_s:.0f} s"
        except (OSError, EngineFailed, ValueError) as error:
            cell.problem = f"failed: {error}"

    def table(self, title: str, workloads: Sequence[Workload]) -> Table:
        """A row a workload, a column an engine."""
        table = Table(title=title, show_lines=True)
        for heading in ("", *self.engines, "Quire / best peer", "Quire / transformers"):
            table.add_column(heading)
        for workload in workloads:
            cells = {name: self.cells[workload.name, name] for name in self.engines}
            texts = [cell.lines() for cell in cells.values()]
            table.add_row(workload.heading, *texts, *ratios(cells))
        peaks = [f"{engine.peak_gib:.2f} GiB" for engine in self.engines.values()]
        table.add_row("peak memory", *peaks, "", "")
        precisions = [engine.about["precision"] for engine in self.engines.values()]
        table.add_row("precision", *precisions, "", "")
        return table


def ratios(cells: dict[str, Cell]) -> tuple[str, str]:
    """Quire over the best of all, and over the better way of transformers."""
    if "quire" not in cells:
        return "-", "-"
    peers = {name: cell for name, cell in cells.items() if name != "quire"}
    transformers = [cell for name, cell in peers.items() if ENGINES[name].is_transformers]
    return ratio(cells["quire"], list(peers.values())), ratio(cells["quire"], transformers)


def cpu_model() -> str:
    """As Linux calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    titles = {workload.name: workload.title for workload in WORKLOADS}
    peers = [name for name in ENGINES if name != "quire"]
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers)
    parser.add_argument("--workloads", nargs="+", choices=titles, default=list(titles))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of measuring, loading not counted"
    )
    parser.add_argument(
        "--cap-s", type=float, default=60.0, help="longest run; half of it for transformers"
    )
    parser.add_argument("--without-quire", action="store_true", help="the peers alone")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "peers")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all")
    return parser.parse_args(arguments)


def settle(arguments: argparse.Namespace) -> list[Workload]:
    """The workloads; with `--quick` small ones, and the rest as small as they are."""
    chosen = [workload for workload in WORKLOADS if workload.name in arguments.workloads]
    if not arguments.quick:
        return chosen
    arguments.shape, arguments.peers, arguments.rounds = "tiny", QUICK_PEERS, 1
    return [workload.shrunk() for workload in chosen]


def compare(arguments: argparse.Namespace, workloads: Sequence[Workload], cache: Path) -> None:
    """Prepare, run, print."""
    checkpoint = cache / "checkpoints" / arguments.shape
    if not checkpoint.exists():
        make_checkpoint(checkpoint, arguments.shape)
    names = [*([] if arguments.without_quire else ["quire"]), *arguments.peers]
    prepared = {name: ENGINES[name].prepare(checkpoint, cache, console) for name in names}
    with ExitStack() as stack:
        with console.status("loading"):
            engines = {name: stack.enter_context(found) for name, found in prepared.items()}
        end = time.monotonic() + 60 * arguments.minutes
        comparison = Comparison(engines, SHAPES[arguments.shape].vocab_size, arguments.cap_s, end)
        for number in range(arguments.rounds):
            comparison.run_round(number, workloads)
        console.print(comparison.table(f"{arguments.shape}, random weights", workloads))
    versions = dict.fromkeys(engine.about["version"] for engine in engines.values())
    console.print(
        f"Output tokens per second, median of n rounds (lowest-highest); TTFT and ITL 50th / 99th percentile.\n"
        f"{'; '.join(versions)}; Python {platform.python_version()}\n"
        f"{cpu_model()}, {os.cpu_count()} cores and threads; {time.strftime('%Y-%m-%d %H:%M')}; "
        f"other programs took {comparison.others.share():.0%} of the processors meanwhile."
    )


def main() -> int:
    """Run what was asked for."""
    arguments = parse()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    workloads = settle(arguments)
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name) if arguments.quick else arguments.cache.resolve()
        cache.mkdir(parents=True, exist_ok=True)
        compare(arguments, workloads, cache)
    return 0


if __name__ == "__main__":
    sys.exit(main())
