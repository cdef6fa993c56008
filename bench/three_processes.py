"""The side of the comparison that is three processes: memory service, compute service, and this, a router's parts.

    python -m bench.three_processes WORKLOAD

WORKLOAD is JSON, a `Workload`. Prints "ready", then answers each line that comes on standard input with a `Round`.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from bench.simulated_load import BLOCK_SIZE, MEMORY_BUDGET, Load, Workload
from quire import logs
from quire.errors import QuireError
from router.clients import ComputeClient, MemoryClient
from router.ordered_stream import StreamLost

if TYPE_CHECKING:
    from router.clients import ServedModel, SessionTerms

_CONNECT_WAIT_S = 0.05


def _start(running: ExitStack, *arguments: str) -> psutil.Process:
    """A service that ends with `running`, and with this process."""
    command = [sys.executable, "-m", *arguments, "--parent-pid", str(os.getpid())]
    process = subprocess.Popen([*command, "--metrics-listen", "off", "--log-level", "warning"])  # noqa: S603 -- our own modules
    running.callback(process.wait)
    running.callback(process.terminate)
    return psutil.Process(process.pid)


def _start_memory(running: ExitStack, folder: Path) -> psutil.Process:
    return _start(
        running,
        *("memory_service", "--listen", f"unix:{folder}/memory.sock"),
        *("--descriptor-socket", f"{folder}/descriptor.sock"),
        *("--memory-budget", str(MEMORY_BUDGET)),
    )


def _start_compute(running: ExitStack, folder: Path, workload: Workload) -> psutil.Process:
    step_ms = workload.step_ms
    module = ["compute_service"] if step_ms is None else ["bench.simulated_compute", f"{step_ms:g}"]
    return _start(
        running,
        *(*module, "--listen", f"unix:{folder}/compute.sock"),
        *("--memory-address", f"unix:{folder}/memory.sock"),
        *("--model", workload.model_folder, "--block-size", str(BLOCK_SIZE)),
    )


async def _connect(
    memory: MemoryClient, compute: ComputeClient
) -> tuple[ServedModel, SessionTerms]:
    """Wait until both services answer."""
    while True:
        try:
            model = await compute.get_model()
            terms = await memory.open_session(model)
            await compute.open_steps(memory.session_id, terms.generation, model.pool_id)
        except (QuireError, StreamLost):
            await asyncio.sleep(_CONNECT_WAIT_S)
        else:
            return model, terms


async def _run(workload: Workload, folder: Path, processes: dict[str, psutil.Process]) -> None:
    memory = MemoryClient(f"unix:{folder}/memory.sock", "bench", workload.num_seqs)
    compute = ComputeClient(f"unix:{folder}/compute.sock")
    model, terms = await _connect(memory, compute)
    await Load(workload, memory, compute, model, terms, processes).answer_rounds()
    await compute.close()
    await memory.close()


def main() -> None:
    """Start the services and run rounds."""
    logs.configure("warning", "console", "bench")
    workload = Workload.from_json(sys.argv[1])
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder = Path(name)
        processes = {
            "router": psutil.Process(),
            "memory": _start_memory(running, folder),
            "compute": _start_compute(running, folder, workload),
        }
        asyncio.run(_run(workload, folder, processes))


if __name__ == "__main__":
    main()
