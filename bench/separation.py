"""What it costs that router, memory and compute are three processes.

    python -m bench.separation [WORKLOAD ...] [--rounds N] [--quick]

The same scheduler, books and engine twice: in one process, called without gRPC (`bench.one_process`), and as three
processes (`bench.three_processes`: the real services, and a router's parts). Both with two steps in flight and the same
way from tokens to text, which goes to a counting sink. They take turns round by round, each waiting while the other
runs. `5x64` is a simulated device that takes 5 ms for a step of 64 sequences; `cpu` is the model of
`bench.random_llama` with 16 sequences, on all cores.

A difference is the median over the rounds of "three processes took so much longer for a step than one", its interval the
least and the greatest of them: of seven or more rounds that holds the median with 98 % and more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.simulated_load import Round, Workload
from quire import demo_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIBRARIES = ("grpcio", "numpy", "protobuf", "torch", "transformers")
SIDES = ("one_process", "three_processes")
NUM_ROUNDS, NUM_SECONDS = 9, 2.0
CPU_STEPS = 60
console = Console(width=160)


@dataclass(slots=True)
class Side:
    """One side, as a process that answers with rounds."""

    name: str
    process: subprocess.Popen[str]
    rounds: list[Round] = field(default_factory=list)

    @classmethod
    @contextmanager
    def started(cls, name: str, workload: Workload) -> Iterator[Side]:
        """It ends with the block."""
        command = [sys.executable, "-m", f"bench.{name}", workload.to_json()]
        process = subprocess.Popen(  # noqa: S603 -- our own module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with process:  # its input ends with the block, and so does it
            yield cls(name, process)

    def wait_until_ready(self) -> None:
        """Models are loaded, sessions are open."""
        self._expect("ready")

    def run(self, number: int) -> Round:
        """Run round `number`."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return Round(**json.loads(self._expect("{")))

    def _expect(self, beginning: str) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(beginning), f"{self.name} ended with status {self.process.wait()}"
        return line


def simulated(name: str, *, num_steps: int | None = None) -> Workload:
    """The workload "5x64": milliseconds a step, sequences."""
    step_ms, num_seqs = name.split("x")
    steps = num_steps or round(NUM_SECONDS * 1e3 / float(step_ms))
    return Workload(name, str(demo_model.path()), float(step_ms), int(num_seqs), steps)


@contextmanager
def cpu_workload(num_steps: int) -> Iterator[Workload]:
    """Sixteen sequences of a model with random weights, whose checkpoint is there within the block."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "bench.random_llama", folder], check=True)  # noqa: S603 -- our own module
        yield Workload("cpu", folder, None, 16, num_steps)


def compare(workload: Workload, num_rounds: int) -> list[Side]:
    """Let both sides run `num_rounds` rounds in turns, after one that is not counted."""
    with ExitStack() as running:
        sides = [running.enter_context(Side.started(name, workload)) for name in SIDES]
        for side in sides:
            side.wait_until_ready()
        for number in range(num_rounds + 1):
            # Whoever comes first in one round comes second in the next.
            for side in sides if number % 2 else reversed(sides):
                found = side.run(number)
                if number:
                    side.rounds.append(found)
            _tell(workload, number, sides)
    return sides


def _tell(workload: Workload, number: int, sides: Sequence[Side]) -> None:
    """Something to look at for whoever waits for the table."""
    steps = [f"{side.name} {side.rounds[-1].step_ms:.2f} ms" for side in sides if side.rounds]
    print(f"{workload.name} round {number}:", *steps, file=sys.stderr)


def slowdowns(sides: Sequence[Side]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """By how many percent a step took longer in three processes than in one, a round an entry."""
    one, three = (np.array([found.step_ms for found in side.rounds]) for side in sides)
    return np.asarray((three / one - 1) * 100)


def make_table(num_rounds: int) -> Table:
    """Without rows."""
    table = Table(title=f"one process and three, medians of {num_rounds} rounds in turns")
    for heading in ("workload", "", "tokens/s", "step ms", "p50", "p99", "in the engine"):
        table.add_column(heading, justify="right")
    table.add_column("processor ms a step")
    table.add_column("longer by")
    return table


def add_rows(table: Table, workload: Workload, sides: Sequence[Side]) -> None:
    """A row for each side."""
    found = slowdowns(sides)
    longer = f"{np.median(found):+.1f} % ({found.min():+.1f} to {found.max():+.1f})"
    for side in sides:
        is_three = side.name == SIDES[1]
        table.add_row(
            "" if is_three else workload.name,
            side.name.replace("_", " "),
            f"{_median(side, 'tokens_per_s'):.0f}",
            *(
                f"{_median(side, name):.2f}"
                for name in ("step_ms", "step_p50_ms", "step_p99_ms", "device_ms")
            ),
            _processor(side),
            longer if is_three else "",
        )


def _median(side: Side, name: str) -> float:
    return float(np.median([getattr(found, name) for found in side.rounds]))


def _processor(side: Side) -> str:
    names = side.rounds[0].processor_ms
    medians = {
        name: np.median([found.processor_ms[name] for found in side.rounds]) for name in names
    }
    return ", ".join(f"{name} {median:.2f}" for name, median in medians.items())


def machine() -> str:
    """Versions and processor."""
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    processor = names[0].partition(": ")[2] if names else platform.machine()
    return f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, {processor}"


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="5x64, 20x256, 5x256, cpu")
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    arguments = parser.parse_args()
    names = arguments.workloads or (
        ["2x8"] if arguments.quick else ["5x64", "20x256", "5x256", "cpu"]
    )
    num_rounds = 1 if arguments.quick else arguments.rounds
    table = make_table(num_rounds)
    with ExitStack() as kept:
        for name in names:
            if name == "cpu":
                workload = kept.enter_context(cpu_workload(10 if arguments.quick else CPU_STEPS))
            else:
                workload = simulated(name, num_steps=30 if arguments.quick else None)
            add_rows(table, workload, compare(workload, num_rounds))
    console.print(table)
    console.print(machine())


if __name__ == "__main__":
    main()
