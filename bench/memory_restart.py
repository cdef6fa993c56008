"""Kill -9 of a memory service that has many cached tokens, and how soon another one serves them."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np

from bench.decode_load import as_message, come_and_go
from bench.running_memory import BLOCK_SIZE, RunningMemory
from protos.memory.v1 import inspection_pb2, inspection_pb2_grpc

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SEQUENCE_TOKENS = 4_000  # a multiple of the block size
_MODULES = "memory_service.__main__"


@dataclass(frozen=True, slots=True)
class Restart:
    """What was measured."""

    serving_s: float  # from the start of the process to health SERVING
    imports_s: float  # of that, Python's start and imports
    num_hit_tokens: int


def measure_restart(num_tokens: int) -> Restart:
    """Fill, kill, start again, ask for every token."""
    prompts = [
        np.random.default_rng(which).integers(0, 50_000, _SEQUENCE_TOKENS, dtype=np.int32)
        for which in range(num_tokens // _SEQUENCE_TOKENS)
    ]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        memory = RunningMemory(Path(folder), num_tokens // BLOCK_SIZE + 64)
        memory.start()
        memory.attach()
        asyncio.run(_fill(memory, prompts))
        memory.process.send_signal(signal.SIGKILL)
        memory.process.wait()
        serving_s = memory.start()
        num_hit_tokens = sum(_probe(memory, prompt) for prompt in prompts)
        memory.process.send_signal(signal.SIGTERM)
        memory.process.wait(30)
    return Restart(serving_s, _seconds_of_imports(), num_hit_tokens)


async def _fill(memory: RunningMemory, prompts: list[NDArray[np.int32]]) -> None:
    """Each prompt comes, runs and goes."""
    async with memory.session(max_num_rows=1) as session:
        for which, prompt in enumerate(prompts):
            for demand in come_and_go(2 * which + 1, f"fill-{which}", prompt):
                await session.ask(as_message(demand, session.generation))


def _probe(memory: RunningMemory, prompt: NDArray[np.int32]) -> int:
    # One token behind the prompt, since the last one is always run.
    request = inspection_pb2.ProbePrefixRequest(token_ids=[*prompt.tolist(), 0])
    with grpc.insecure_channel(memory.address) as channel:
        stub = inspection_pb2_grpc.InspectionServiceStub(channel)
        return int(stub.ProbePrefix(request, timeout=10).num_cached_tokens)


def _seconds_of_imports() -> float:
    started = time.monotonic()
    subprocess.run(  # noqa: S603 -- our own module
        [sys.executable, "-c", f"import {_MODULES}"], check=True
    )
    return time.monotonic() - started
