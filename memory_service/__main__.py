"""`python -m memory_service`: the memory service as a process."""

from __future__ import annotations

import gc
import sys

if __name__ == "__main__":
    # A start is waited for by all requests. Nearly all that it makes stays, so looking for garbage in it is in vain; and
    # structlog would import rich, for tracebacks that `quire.logs` does not show.
    gc.disable()
    sys.modules["rich"] = None  # type: ignore[assignment]

import asyncio
import os
import secrets
import time
from typing import TYPE_CHECKING, NoReturn

import structlog

from memory_service.control_servicer import ControlServicer
from memory_service.descriptor_server import DescriptorServer
from memory_service.explanations import Explanations
from memory_service.inspection_servicer import InspectionServicer
from memory_service.integrity import integrity_parts
from memory_service.log_file import LogUnwritable, StateError
from memory_service.metrics import StepTally, memory_metrics
from memory_service.pool_keeper import PoolKeeper
from memory_service.pool_registry import PoolRegistry
from memory_service.servicer import MemoryServicer, PoolServicer
from memory_service.sessions import Sessions
from memory_service.state_store import StateStore
from memory_service.unhurried import in_turns
from memory_service.watching import Watching
from protos.memory.v1 import (
    control_pb2_grpc,
    inspection_pb2_grpc,
    memory_pb2_grpc,
    pool_pb2_grpc,
)
from quire import logs, serving
from quire.errors import NoPool
from quire.metrics import MetricsEndpoint, OnLoop
from quire.settings import MemorySettings
from quire.settings_loader import load

if TYPE_CHECKING:
    import grpc

    from memory_service.record import WriterAttached

_SERVICES = (
    "quire.memory.v1.MemoryService",
    "quire.memory.v1.PoolService",
    "quire.memory.v1.InspectionService",
    "quire.memory.v1.ControlService",
)
_SWEEP_INTERVAL_S = 0.5
_SECRET_BYTES = 32

_logger = structlog.get_logger()


def main() -> int:
    """Run until SIGTERM or SIGINT; the process's exit status."""
    settings = load(MemorySettings, sys.argv[1:], prog="quire memory")
    logs.configure(settings.log_level, settings.log_format, "memory")
    try:
        asyncio.run(_serve(settings))
    except (serving.StartupError, StateError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(settings: MemorySettings) -> None:
    stop = asyncio.Event()
    serving.install_stop_signals(asyncio.get_running_loop(), stop)
    serving.end_with_parent(settings.parent_pid)
    store = _open_store(settings)
    registry = PoolRegistry(
        settings.memory_budget,
        secret=store.secret if store else secrets.token_bytes(_SECRET_BYTES),
        state_dir=settings.state_dir,
        prefix_cache_enabled=settings.prefix_cache,
        min_partial_tokens=settings.min_partial_tokens,
        on_broken=_end_broken,
    )
    registry.when_writer_attached(lambda attached: _note(registry, attached))
    explanations = Explanations()
    registry.when_books_begin(explanations.listen_to)
    sessions = Sessions(
        registry,
        clock=time.monotonic,
        lease_ttl_s=settings.lease_ttl_s,
        max_num_rows=settings.max_num_rows,
    )
    keeper = PoolKeeper(registry, store, _end_at_once) if store else None
    if keeper is not None:
        _restore(keeper, sessions, settings)
    tally, metrics = StepTally(), MetricsEndpoint("memory")
    loop = asyncio.get_running_loop()
    metrics.add(OnLoop(loop, lambda: memory_metrics(registry, sessions, tally, store)))
    server, reporter = serving.create_server(), serving.HealthReporter()
    _add_servicers(
        server,
        MemoryServicer(registry, sessions, tally, explanations),
        PoolServicer(registry, str(settings.descriptor_socket)),
        InspectionServicer(registry, store, explanations, Watching(registry, store)),
        ControlServicer(registry),
    )
    descriptors = DescriptorServer(settings.descriptor_socket, registry)
    addresses = [serving.bind(server, address) for address in settings.listen]
    try:
        metrics.start(settings.metrics_listen)
        descriptors.start()
        await reporter.add_to(server, _SERVICES)
        await server.start()
        await reporter.set_serving(serving=True)
        gc.freeze()
        gc.enable()
        _logger.info("serving", addresses=addresses, metrics=metrics.address)
        sweeping = asyncio.create_task(_sweep(registry, sessions, tally, keeper))
        await serving.serve_until_stopped(server, reporter, stop, settings.shutdown_grace_s)
        sweeping.cancel()
    finally:
        metrics.stop()
        await descriptors.close()
        registry.close()
        if store is not None:
            store.close()
        for address in addresses:
            serving.release_unix_path(address)


def _open_store(settings: MemorySettings) -> StateStore | None:
    """The store of the state folder, if there is to be one; raises StateError."""
    if settings.state_dir is None:
        return None
    return StateStore(
        settings.state_dir,
        compact_size_bytes=settings.log_compact_size,
        history_bytes=settings.log_history,
    )


def _note(registry: PoolRegistry, attached: WriterAttached) -> None:
    """The pool's books know who writes."""
    registry.pool.manager.attach_writer(attached.generation, attached.pid, attached.started_ticks)


def _restore(keeper: PoolKeeper, sessions: Sessions, settings: MemorySettings) -> None:
    try:
        keeper.restore(sessions)
    except StateError as error:
        message = f"{error}; to start with an empty pool, move {settings.state_dir} away"
        raise StateError(message) from error


def _end_broken(error: Exception) -> NoReturn:
    """The books are in a state that no record tells of: another process goes on from what was told."""
    _logger.error("books_broken", exc_info=error)
    print(f"error: a change of the pool's books failed: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _end_at_once(error: LogUnwritable) -> NoReturn:
    """Not one more answer is sent, nor anything else done: what the log does not know did not happen."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _add_servicers(
    server: grpc.aio.Server,
    memory: MemoryServicer,
    pool: PoolServicer,
    inspection: InspectionServicer,
    control: ControlServicer,
) -> None:
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(memory, server)
    pool_pb2_grpc.add_PoolServiceServicer_to_server(pool, server)
    inspection_pb2_grpc.add_InspectionServiceServicer_to_server(inspection, server)
    control_pb2_grpc.add_ControlServiceServicer_to_server(control, server)


async def _sweep(
    registry: PoolRegistry, sessions: Sessions, tally: StepTally, keeper: PoolKeeper | None
) -> None:
    """End lapsed sessions, keep the state folder small; when the pool fell idle, verify its books once."""
    checked = 0
    while True:
        await asyncio.sleep(_SWEEP_INTERVAL_S)
        for session_id in sessions.end_lapsed():
            _logger.warning("session_lapsed", session_id=session_id)
        registry.drop_lost_pool()
        if keeper is not None:
            keeper.tend()
        try:
            manager = registry.pool.manager
        except NoPool:
            continue
        manager.sharing.expire(time.time())
        if manager.num_sequences == 0 and manager.revision != checked:
            checked = manager.revision
            # Of the keys alone it is not asked: to hash them all again takes longer than a pause may last.
            findings = await in_turns(integrity_parts(manager))
            tally.checked(len(findings))
            for finding in findings:
                _logger.error("integrity", finding=finding)


if __name__ == "__main__":
    sys.exit(main())
