"""The side of the comparison that is one process: the same scheduler, books and engine, called without gRPC.

    python -m bench.one_process WORKLOAD

WORKLOAD is JSON, a `Workload`. Prints "ready", then answers each line that comes on standard input with a `Round`.
As in the compute service the engine has the main thread; the scheduler and the books share a loop on a side thread.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from bench.in_process_compute import InProcessCompute
from bench.in_process_memory import InProcessMemory
from bench.simulated_device import SimulatedForward, simulated_device
from bench.simulated_load import BLOCK_SIZE, MEMORY_BUDGET, Load, Workload
from compute_service.__main__ import end
from compute_service.device import open_device
from compute_service.engine import Engine
from compute_service.forward import ForwardPass
from compute_service.kv_pool import open_pool
from compute_service.model_loader import load_model
from memory_service.descriptor_server import DescriptorServer
from quire import logs

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from concurrent.futures import Future

    from compute_service.clients import AttachedPool
    from compute_service.device import ComputeDevice
    from compute_service.kv_pool import KvPool
    from compute_service.model_loader import LoadedModel


class _SideLoop:
    """An event loop on a side thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="loop", daemon=True).start()

    def begin(self, work: Coroutine[None, None, None]) -> Future[None]:
        """Run `work` there."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)


async def _start(descriptors: DescriptorServer) -> None:
    descriptors.start()


def _attach(
    memory: InProcessMemory, loaded: LoadedModel, device: ComputeDevice, side: _SideLoop, path: Path
) -> tuple[AttachedPool, KvPool]:
    """Shared memory, mapped, as the services have it."""
    side.begin(_start(DescriptorServer(path, memory.registry))).result()
    attached = memory.attach(loaded, str(path))
    pool = open_pool(attached, loaded.layers, loaded.dtype, BLOCK_SIZE, device)
    return attached, pool


def _make_engine(
    workload: Workload, loaded: LoadedModel, device: ComputeDevice, pool: KvPool
) -> Engine:
    forward = (
        ForwardPass(loaded.model, device.kernels, pool.caches)
        if workload.step_ms is None
        else SimulatedForward(
            loaded.model, device.kernels, pool.caches, step_s=workload.step_ms * 1e-3
        )
    )
    engine = Engine(forward, device.kernels, pool.caches, BLOCK_SIZE, device.torch_device)
    engine.warm_up()
    return engine


async def _answer_rounds(
    workload: Workload, memory: InProcessMemory, compute: InProcessCompute
) -> None:
    model = await compute.get_model()
    terms = await memory.open_session(model)
    await compute.open_steps(memory.session_id, terms.generation, model.pool_id)
    processes = {"all": psutil.Process()}
    await Load(workload, memory, compute, model, terms, processes).answer_rounds()


def _run(workload: Workload, folder: Path) -> None:
    device = open_device("cpu")
    loaded = load_model(
        workload.model_folder,
        dtype="auto",
        max_model_len=None,
        trust_remote_code=False,
        device=device,
    )
    memory, side = InProcessMemory(MEMORY_BUDGET, BLOCK_SIZE, workload.num_seqs), _SideLoop()
    attached, pool = _attach(memory, loaded, device, side, folder / "descriptor.sock")
    engine = _make_engine(workload, loaded, device, pool)
    gc.collect()
    gc.freeze()
    compute = InProcessCompute(engine, loaded, attached)
    answering = side.begin(_answer_rounds(workload, memory, compute))
    answering.add_done_callback(lambda _: engine.stop())
    engine.run()
    answering.result()


# Seconds for which a thread that computes keeps the interpreter from others. With Python's own 5 ms the engine would wait
# that long after every step while the scheduler works: the comparison should not win by that.
_SWITCH_INTERVAL_S = 5e-4


def main() -> int:
    """Build all of it and run rounds; the process's exit status."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    logs.configure("warning", "console", "bench")
    workload = Workload.from_json(sys.argv[1])
    with tempfile.TemporaryDirectory() as name, ExitStack() as replaced:
        if workload.step_ms is not None:
            replaced.enter_context(simulated_device(workload.step_ms * 1e-3))
        _run(workload, Path(name))
    return 0


if __name__ == "__main__":
    end(main())
