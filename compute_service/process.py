"""The compute service from its settings to its end.

The engine has the main thread: torch's OpenMP runtime slows down when parallel regions begin on a second one. gRPC's loop
has a side thread.
"""

from __future__ import annotations

import gc
import signal
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import structlog
import torch

from compute_service.clients import AttachedPool, PoolClient, PoolIdentity
from compute_service.device import ComputeDevice, open_device
from compute_service.engine import Engine
from compute_service.fast_paths import FastPaths
from compute_service.forward import ForwardPass
from compute_service.kv_pool import KvPool, open_pool
from compute_service.memory_watch import MemoryWatch
from compute_service.metrics import EngineTally
from compute_service.model_loader import LoadedModel, load_model
from compute_service.server_thread import ServerThread
from compute_service.servicer import ComputeServicer
from kernels.ahead import Compilation
from quire.metrics import MetricsEndpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from quire.settings import ComputeSettings

_logger = structlog.get_logger()


class _StoppedWhileLoading(BaseException):
    """SIGTERM or SIGINT before there was an engine to stop."""


def serve(settings: ComputeSettings) -> int:
    """Run until SIGTERM or SIGINT; the process's exit status.

    Raises:
        StartupError: when an address is taken or the device is not there.
        ModelRefused: when the checkpoint cannot be served.
        QuireError: when the memory service refuses the pool.
        DescriptorRefusedError, WrongPoolBytesError: when the bytes that it hands over are not the pool's.
    """
    _at_stop(_raise_stopped)
    try:
        return _serve(settings)
    except _StoppedWhileLoading:
        return 0


def _serve(settings: ComputeSettings) -> int:
    tally, metrics = EngineTally(), MetricsEndpoint("compute")
    metrics.add(tally)
    servicer = ComputeServicer(tally)
    server = ServerThread(servicer, settings.listen)
    server.start()
    try:
        metrics.start(settings.metrics_listen)
        engine, pool, resume = _make_engine(settings, servicer, tally)
        _at_stop(lambda _number, _frame: engine.stop())
        server.set_serving(serving=True)
        _logger.info("serving", addresses=server.addresses, metrics=metrics.address)
        watch = MemoryWatch(pool, resume, engine.stop)
        engine.run()
        if watch.why_gone is not None:
            # Whoever starts both again gets a new pool; to go on would be to write into one that nobody keeps books of.
            _logger.warning(
                "memory_service_gone",
                reason=watch.why_gone,
                consequence="the pool is lost, this ends too",
            )
            return 1
        pool.close()
        return 0
    finally:
        metrics.stop()
        server.stop()


def _make_engine(
    settings: ComputeSettings, servicer: ComputeServicer, tally: EngineTally
) -> tuple[Engine, KvPool, Callable[[], None]]:
    """The engine, its pool, and what goes on with the pool after a restart of the memory service."""
    if settings.num_threads is not None:
        # Before the kernels are there, which take as many.
        torch.set_num_threads(settings.num_threads)
    device = open_device(settings.device, settings.attention_kernel)
    if device.torch_device.type == "cpu":
        device = replace(device, wait_for_kernels=_compile_kernels(settings.dtype))
    loaded = _load(settings, device, tally)
    client = _pool_client(settings, loaded, device)
    attached = _attach(client)
    pool = open_pool(attached, loaded.layers, loaded.dtype, settings.block_size, device)
    forward = ForwardPass(loaded.model, device.kernels, pool.caches)
    engine = Engine(forward, device.kernels, pool.caches, settings.block_size, device.torch_device)
    engine.warm_up()
    _collect_garbage_again()
    servicer.serve(engine, loaded, attached)
    return engine, pool, partial(_resume, client, attached, pool, settings.memory_patience_s)


def _compile_kernels(dtype: str) -> Callable[[], None]:
    """Begin to compile what no start has compiled before; what waits for it."""
    compilation = Compilation("bfloat16" if dtype == "auto" else dtype)
    if compilation.is_running:
        _logger.info("compiling_kernels", consequence="this start takes half a minute longer")
    return compilation.wait


def _load(settings: ComputeSettings, device: ComputeDevice, tally: EngineTally) -> LoadedModel:
    started = time.monotonic()
    loaded = load_model(
        settings.model,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        trust_remote_code=settings.trust_remote_code,
        device=device,
        fast_paths=FastPaths(
            packed_weights=settings.packed_weights,
            fused_ops=settings.fused_ops,
            fused_layers=settings.fused_layers,
        ),
    )
    tally.model_loaded(loaded, time.monotonic() - started)
    _logger.info("model_loaded", seconds=round(time.monotonic() - started, 1))
    return loaded


def _pool_client(
    settings: ComputeSettings, loaded: LoadedModel, device: ComputeDevice
) -> PoolClient:
    identity = PoolIdentity(
        loaded.layers,
        str(loaded.dtype).removeprefix("torch."),
        settings.block_size,
        loaded.fingerprint,
    )
    return PoolClient(
        settings.memory_address, identity, loaded.max_model_len, in_own_memory=device.holds_pool
    )


def _attach(client: PoolClient) -> AttachedPool:
    attached = client.attach()
    _logger.info(
        "pool_attached",
        pool_id=attached.pool_id,
        num_blocks=attached.num_blocks,
        warm=attached.warm,
    )
    return attached


def _resume(client: PoolClient, attached: AttachedPool, pool: KvPool, patience_s: float) -> None:
    """Runs on the thread of the watch, while the engine runs on."""
    logger = _logger.bind(pool_id=attached.pool_id, writer_generation=attached.writer_generation)
    logger.warning("memory_lost", patience_s=patience_s)
    started = time.monotonic()
    client.resume(attached, pool.resume, patience_s)
    logger.info("memory_resumed", seconds=round(time.monotonic() - started, 1))


def _collect_garbage_again() -> None:
    """What the start left behind goes now; what stays is not searched again, so that no step waits for that."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _at_stop(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _raise_stopped(_number: int, _frame: FrameType | None) -> None:
    raise _StoppedWhileLoading
