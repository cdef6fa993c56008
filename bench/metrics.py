"""What metrics and logs cost: microseconds in process, and output tokens per second of `quire up` with and without.

    python -m bench.metrics [--requests 16] [--rounds 6] [--starts 2]

In process: what is counted for one step of 64 sequences, what a request adds, and its line in the log. Counting goes on
under `--no-metrics` too, so its share of a step is reckoned from the step's time. The runs compare the defaults, scraped
once a round, which is more often than a Prometheus does it, with `--no-metrics --log-level warning`: the endpoint, the
scrapes and a line a request are what differs.
Both systems of a start are up at once and take turns, with the demo model.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen

import psutil
import structlog
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from compute_service.metrics import EngineTally
from compute_service.sampling import SampledToken
from compute_service.step import Step, StepDone
from memory_service.demand import StepAnswer
from memory_service.metrics import StepTally
from quire import logs
from quire.client import Client
from router.output_stream import OutputStream
from router.request import FinishReason, Request, Sequence, first_sequence
from router.request_log import log_finished
from router.sampling_params import SamplingParams, StoppingCriteria
from router.step import StepResult
from router.tally import StepTimes, Tally
from router.text_output import TextOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NUM_SEQS, NUM_INPUT, NUM_OUTPUT = 64, 32, 128
SCRAPE_AFTER_S = 0.5
ARMS = {"defaults, scraped": (), "without": ("--no-metrics", "--log-level", "warning")}
LIBRARIES = ("grpcio", "prometheus_client", "structlog", "torch")
SERVICES = ("router", "memory", "compute")
console = Console(width=110)


def microseconds(work: Callable[[], object], *, repeats: int = 7, calls: int = 2_000) -> float:
    """Of one call: the fastest of some runs, since a noisy machine only ever adds."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            work()
        best = min(best, time.perf_counter() - started)
    return best / calls * 1e6


def make_sequence() -> Sequence:
    """A live sequence, the only one of its request."""
    request = Request(
        request_id="request",
        prompt_token_ids=array("i", range(NUM_INPUT)),
        sampling=SamplingParams(),
        stopping=StoppingCriteria(),
        seed=0,
        max_tokens=NUM_OUTPUT,
        end_token_ids=frozenset(),
        eos_token_ids=frozenset(),
        priority=0,
        sink=OutputStream(1),
        new_output=lambda token_ids: TextOutput(token_ids, None, (), include_stop_string=False),
    )
    request.received_at, request.finish_reason = time.monotonic(), FinishReason.LENGTH
    return first_sequence(request)


def router_step(sequences: list[Sequence]) -> Callable[[], None]:
    """What the router counts in a step, its five clock readings included."""
    tally, times = Tally(), StepTimes(1e-4, 1e-3, 1e-2, 1e-3)
    result = StepResult(1, [], [], {}, device_us=9_000)

    def step() -> None:
        for _ in range(5):
            time.perf_counter()
        tally.tokens(sequences, tally.now())
        tally.step_ended(times, result)

    return step


def compute_step() -> Callable[[], None]:
    """What the compute service counts in a step."""
    tally, rows = EngineTally(), tuple(range(NUM_SEQS))
    told: tuple[()] = ()
    step = Step(
        *(1, 1, 1, False, told, told, told, told, told, told),
        *(rows, rows, (1,) * NUM_SEQS, told, tuple((row, 0) for row in rows)),
    )
    done = StepDone(1, 1, (SampledToken(1, None, ()),) * NUM_SEQS, rows, 9_000, 100)
    return lambda: tally.answered(step, done)


def count_request(request: Request) -> Callable[[], None]:
    """What the router counts for a request from its acceptance to its end."""
    tally = Tally()

    def live_and_end() -> None:
        tally.accepted(request, 1.0)
        tally.admitted(request)
        tally.finished(request)

    return live_and_end


def in_process() -> tuple[Table, float]:
    """The costs, and microseconds that all three services count in a step."""
    sequences = [make_sequence() for _ in range(NUM_SEQS)]
    request, memory, answer = sequences[0].request, StepTally(), StepAnswer(1)
    steps = {
        "router": microseconds(router_step(sequences)),
        "memory": microseconds(lambda: memory.answered(answer, 0, 1e-3)),
        "compute": microseconds(compute_step()),
    }
    table = Table(title=f"In process; a step has {NUM_SEQS} sequences, one token each")
    table.add_column("what")
    table.add_column("microseconds", justify="right")
    for service, cost in steps.items():
        table.add_row(f"{service}, a step", f"{cost:.1f}")
    table.add_row("router, a token", f"{steps['router'] / NUM_SEQS:.2f}")
    table.add_row("router, a request", f"{microseconds(count_request(request)):.1f}")
    for fmt in ("console", "json"):
        table.add_row(f"line of a request, {fmt}", f"{log_line(request, fmt):.1f}")
    return table, sum(steps.values())


def log_line(request: Request, fmt: str) -> float:
    """Microseconds of the line that ends a request, written to /dev/null."""
    error, logger = sys.stderr, structlog.get_logger()
    with Path("/dev/null").open("w") as sys.stderr:
        logs.configure("info", fmt, "router")
        structlog.configure(cache_logger_on_first_use=False)
        logger.info("warm")
        cost = microseconds(lambda: log_finished(request), calls=500)
    sys.stderr = error
    return cost


@dataclass
class System:
    """A `quire up` under measurement."""

    addresses: dict[str, str]
    client: Client
    services: list[psutil.Process]  # router and memory
    rates: list[float] = field(default_factory=list)  # output tokens per second, of each round
    cpu_us: list[float] = field(default_factory=list)  # of router and memory, a token

    @property
    def has_metrics(self) -> bool:
        """Whether there is anything to scrape."""
        return "router_metrics" in self.addresses

    def read(self, service: str) -> str:
        """What GET /metrics answers."""
        with urlopen(f"http://{self.addresses[f'{service}_metrics']}/metrics") as answer:
            text: str = answer.read().decode()
            return text

    def cpu_s(self) -> float:
        """Seconds of CPU that router and memory have used."""
        return sum(sum(process.cpu_times()[:2]) for process in self.services)

    def run_round(self, num_requests: int) -> None:
        """As many streams at once; notes their rate and what they cost."""
        started, cpu_before = time.perf_counter(), self.cpu_s()
        with ThreadPoolExecutor(num_requests) as pool:
            num_tokens = sum(pool.map(self._stream, range(num_requests)))
        self.rates.append(num_tokens / (time.perf_counter() - started))
        self.cpu_us.append((self.cpu_s() - cpu_before) / num_tokens * 1e6)

    def _stream(self, _index: int) -> int:
        prompt = [random.randrange(10, 4_000) for _ in range(NUM_INPUT)]  # noqa: S311 -- no secret
        deltas = self.client.generate(prompt, max_tokens=NUM_OUTPUT, ignore_eos=True)
        return sum(len(delta.token_ids) for delta in deltas)


@contextmanager
def running_system(flags: tuple[str, ...]) -> Iterator[System]:
    """`quire up` with the demo model, its log thrown away."""
    quire = str(Path(sys.executable).with_name("quire"))
    command = [quire, "up", "--listen", "127.0.0.1:0", "--memory-budget", "64MiB", *flags]
    process = subprocess.Popen(  # noqa: S603 -- ourselves
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        ready = dict(part.split("=", 1) for part in process.stdout.readline().split()[1:])
        children = psutil.Process(process.pid).children()
        services = [found for found in children if "compute_service" not in found.cmdline()]
        with Client(ready["router"]) as client:
            yield System(ready, client, services)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@contextmanager
def scraped(system: System, scrape_ms: list[float]) -> Iterator[None]:
    """Scrapes all three services once beside the block, if the system has metrics."""

    def work() -> None:
        started = time.perf_counter()
        for service in SERVICES:
            system.read(service)
        scrape_ms.append((time.perf_counter() - started) * 1e3)

    scraper = threading.Timer(SCRAPE_AFTER_S, work)
    if system.has_metrics:
        scraper.start()
    yield
    if system.has_metrics:
        scraper.join()


@dataclass
class Runs:
    """What all rounds of all starts gave, by arm."""

    rates: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    cpu_us: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    scrape_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)  # mean of each start

    def start(self, arms: list[str], num_requests: int, num_rounds: int) -> None:
        """Start a system of each arm, the first of `arms` first, and let them take turns."""
        with running_system(ARMS[arms[0]]) as first, running_system(ARMS[arms[1]]) as second:
            systems = [first, second]
            for number in range(num_rounds + 1):
                for system in systems[:: -1 if number % 2 else 1]:
                    with scraped(system, self.scrape_ms):
                        system.run_round(num_requests)
            for arm, system in zip(arms, systems, strict=True):
                # The first round warmed up.
                self.rates[arm] += system.rates[1:]
                self.cpu_us[arm] += system.cpu_us[1:]
                if system.has_metrics:
                    self.step_ms.append(step_ms(system))

    def report(self, num_requests: int) -> None:
        """Print the table."""
        title = f"quire up, demo model, {num_requests} streams, {NUM_INPUT} in, {NUM_OUTPUT} out"
        table = Table(title=title)
        for heading in ("run", "tokens/s, median", "lowest", "highest", "CPU us a token *"):
            table.add_column(heading, justify="right" if heading != "run" else "left")
        for arm, found in self.rates.items():
            numbers = (statistics.median(found), min(found), max(found))
            cells = [f"{number:.0f}" for number in numbers]
            table.add_row(arm, *cells, f"{statistics.median(self.cpu_us[arm]):.0f}")
        console.print(table)
        ratios = [with_ / without for with_, without in zip(*self.rates.values(), strict=True)]
        costs = sorted((1 - found) * 100 for found in ratios)
        repeats = [abs(b / a - 1) for found in self.rates.values() for a, b in pairwise(found)]
        console.print(
            f"* of router and memory service. Cost in throughput, median of {len(costs)} pairs: "
            f"{statistics.median(costs):+.1f} % ({costs[0]:+.1f} to {costs[-1]:+.1f}); two rounds of the "
            f"same run differ by {statistics.median(repeats) * 100:.1f} %. "
            f"A scrape of all three services takes {statistics.median(self.scrape_ms):.1f} ms."
        )


def step_ms(system: System) -> float:
    """Mean time of a step over all its stages."""
    samples = {
        (sample.name, sample.labels.get("stage")): sample.value
        for family in text_string_to_metric_families(system.read("router"))
        for sample in family.samples
    }
    total = sum(value for (name, _), value in samples.items() if name == "quire_step_seconds_sum")
    return float(total / samples["quire_step_seconds_count", "plan"] * 1e3)


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6, help="of a start; two at least")
    parser.add_argument("--starts", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.rounds < 2:  # noqa: PLR2004 -- as the message says
        parser.error(
            "--rounds: what two rounds of the same run differ by is what the machine can show"
        )
    costs, step_us = in_process()
    console.print(costs)
    runs = Runs()
    for number in range(arguments.starts):
        runs.start(list(ARMS)[:: -1 if number % 2 else 1], arguments.requests, arguments.rounds)
    runs.report(arguments.requests)
    mean_step_ms = statistics.fmean(runs.step_ms)
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    console.print(
        f"A step took {mean_step_ms:.1f} ms; what is counted in one of {NUM_SEQS} sequences, {step_us:.0f} us "
        f"in all, is {step_us / mean_step_ms / 10:.2f} % of that.\n"
        f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores, {platform.machine()}"
    )


if __name__ == "__main__":
    main()
