"""What the memory service costs: its core, a step on the wire, a restart.

    python -m bench.memory [core] [wire] [restart] [--quick]

core: a decode step of 256 sequences (demand, commit, 16 blocks that open, 16 that seal), its record written to a log;
the same in pools of ten thousand to ten million blocks that are full of cached ones; the admission of a prompt of 32,768
tokens that hits entirely; bytes of metadata a block. wire: that step over a Unix socket, in turns with a step that
demands nothing. restart: kill -9 with a million cached tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import platform
import sys
import tempfile
import time
from array import array
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.decode_load import BLOCK_SIZE, DecodeLoad, as_message, come_and_go
from bench.memory_restart import measure_restart
from bench.running_memory import RunningMemory
from memory_service.block_hash import BlockHasher
from memory_service.block_manager import BlockManager
from memory_service.log_codec import encode_record
from memory_service.log_file import FrameWriter
from protos.memory.v1 import memory_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from memory_service.record import Record

NUM_SEQS, PROMPT_TOKENS = 256, 32_768
STEPS_OF_A_ROUND = 250  # sequences grow: the smallest pool holds no more of them
SESSION = 1
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
QUICK_SIZES = (10_000, 20_000)
LIBRARIES = ("grpcio", "numpy", "protobuf")
console = Console(width=110)


@dataclass(frozen=True, slots=True)
class Spread:
    """Times of one operation in microseconds."""

    median: float
    high: float  # 99th percentile
    worst: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        """Of times in seconds."""
        found = np.array(seconds) * 1e6
        return cls(float(np.median(found)), float(np.percentile(found, 99)), float(found.max()))

    def cells(self) -> tuple[str, str, str]:
        """For a row."""
        return f"{self.median:,.0f}", f"{self.high:,.0f}", f"{self.worst:,.0f}"


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` took."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def log_to(folder: str) -> Callable[[Record], None]:
    """Writes records as the service does."""
    writer = FrameWriter.create(Path(folder) / "log", b"header")
    return lambda record: writer.append([encode_record(record)])


def make_manager(num_blocks: int, folder: str) -> BlockManager:
    """An empty pool whose records are written to a log in `folder`."""
    manager = BlockManager(
        num_blocks, BLOCK_SIZE, BlockHasher(b"secret", b"root"), min_partial_tokens=4
    )
    manager.on_record = log_to(folder)
    manager.open_session(SESSION, 4096, "bench")
    return manager


def fill_with_cached(manager: BlockManager, num_blocks: int) -> None:
    """Leave `num_blocks` cached blocks behind: sequences that came, ran and went."""
    random = np.random.default_rng(1)
    length = 512 * BLOCK_SIZE
    for which in range(-(-num_blocks * BLOCK_SIZE // length)):
        tokens = random.integers(0, 50_000, length, dtype=np.int32)
        for demand in come_and_go(2 * which + 1, f"fill-{which}", tokens):
            manager.apply(SESSION, demand)


def decode_steps(manager: BlockManager, count: int) -> Spread:
    """Steps of a session of its own; all their blocks are evicted ones when the pool is full."""
    seconds = []
    for _ in range(-(-count // STEPS_OF_A_ROUND)):
        load = DecodeLoad(NUM_SEQS)
        for demand in load.admissions():
            manager.apply(SESSION, demand)
        for _ in range(min(count, STEPS_OF_A_ROUND)):
            demand = load.next_step()
            seconds.append(timed(lambda demand=demand: manager.apply(SESSION, demand)))  # type: ignore[misc]
        manager.close_session(SESSION)
        manager.open_session(SESSION, 4096, "bench")
    return Spread.of(seconds)


def hit_a_long_prompt(manager: BlockManager, rounds: int) -> Spread:
    """Admit a prompt that is cached whole but for the token that is always run."""
    tokens = np.random.default_rng(2).integers(0, 50_000, PROMPT_TOKENS, dtype=np.int32)
    seconds = []
    for which in range(rounds + 1):
        # A prompt that is asked about again is remembered: another last token makes it a new one.
        prompt = np.append(tokens, np.int32(which))
        cached = PROMPT_TOKENS if which else 0
        come, go = come_and_go(2 * which + 1, f"long-{which}", prompt, cached)
        seconds.append(timed(lambda come=come: manager.apply(SESSION, come)))  # type: ignore[misc]
        manager.apply(SESSION, go)
    assert manager.num_prefix_hit_tokens >= rounds * PROMPT_TOKENS
    return Spread.of(seconds[1:])


def metadata_bytes(manager: BlockManager) -> int:
    """Bytes of everything that is kept by block: counts, lists, prefix index, token ids."""
    pool = manager.pool
    kept = [
        value
        for owner in (vars(pool), vars(pool.index), vars(pool.queue))
        for value in owner.values()
        if isinstance(value, array | bytearray | np.ndarray)
    ]
    # Some are views of others.
    views = [np.frombuffer(value, np.uint8) for value in kept if len(value)]
    return sum({view.ctypes.data: view.nbytes for view in views}.values())


def bench_core(*, quick: bool) -> None:
    """The block manager alone."""
    table = Table("blocks", "decode step us", "p99", "worst", "32k hit us", "bytes a block")
    steps, rounds = (50, 2) if quick else (2_000, 20)
    for num_blocks in QUICK_SIZES if quick else SIZES:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            manager = make_manager(num_blocks, folder)
            if num_blocks <= 1_000_000:  # noqa: PLR2004 -- filling ten million takes minutes
                fill_with_cached(manager, num_blocks)
            gc.collect()
            num_bytes = metadata_bytes(manager) / num_blocks
            spread = decode_steps(manager, steps)
            hit = hit_a_long_prompt(manager, rounds)
        table.add_row(f"{num_blocks:,}", *spread.cells(), f"{hit.median:,.0f}", f"{num_bytes:.0f}")
        del manager
    console.print("core, record written:", table, sep="\n")


async def wire_steps(memory: RunningMemory, count: int) -> tuple[Spread, Spread]:
    """Decode steps and empty ones in turns."""
    load = DecodeLoad(NUM_SEQS)
    async with memory.session(max_num_rows=NUM_SEQS) as session:
        for demand in load.admissions():
            await session.ask(as_message(demand, session.generation))
        full: list[float] = []
        empty: list[float] = []
        for _ in range(count):
            message = as_message(load.next_step(), session.generation)
            started = time.perf_counter()
            await session.ask(message)
            full.append(time.perf_counter() - started)
            load.step += 1
            nothing = pb.AllocateStep(generation=session.generation, step=load.step)
            started = time.perf_counter()
            await session.ask(pb.SessionRequest(step=nothing))
            empty.append(time.perf_counter() - started)
    return Spread.of(full), Spread.of(empty)


def bench_wire(*, quick: bool) -> None:
    """A step as the router sends it."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        RunningMemory.started(Path(folder), num_blocks=50_000) as memory,
    ):
        full, empty = asyncio.run(wire_steps(memory, 50 if quick else 2_000))
    table = Table("Unix socket, state folder", "p50 us", "p99", "worst")
    table.add_row("decode step of 256", *full.cells())
    table.add_row("empty step", *empty.cells())
    console.print(table)


def bench_restart(*, quick: bool) -> None:
    """A service that is killed and started again."""
    num_tokens = 20_000 if quick else 1_000_000
    found = measure_restart(num_tokens)
    table = Table(
        "kill -9 with cached tokens", "serving again after s", "of that Python and imports", "hit"
    )
    table.add_row(
        f"{num_tokens:,}",
        f"{found.serving_s:.2f}",
        f"{found.imports_s:.2f}",
        f"{found.num_hit_tokens / num_tokens:.1%}",
    )
    console.print(table)


def pace() -> str:
    """What elementary things cost, since machines differ by a factor of five and no number here means much without."""
    numbers = np.zeros(NUM_SEQS, np.int32)
    add = timed(lambda: [numbers + 1 for _ in range(20_000)]) / 20_000
    loop = timed(lambda: sum(index for index in range(1_000_000))) / 1_000_000
    return f"numpy adds {NUM_SEQS} numbers in {add * 1e6:.2f} us, a turn of a loop takes {loop * 1e9:.0f} ns"


def main() -> int:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parts = {"core": bench_core, "wire": bench_wire, "restart": bench_restart}
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all")
    arguments = parser.parse_args()
    console.print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()},",
        ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
    )
    console.print(f"how fast it is now: {pace()}")
    for name in arguments.parts or parts:
        parts[name](quick=arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
