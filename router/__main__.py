"""`python -m router`: the router as a process."""

from __future__ import annotations

import asyncio
import gc
import sys
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING

import structlog

from protos.router.v1 import router_pb2_grpc
from quire import logs, serving
from quire.metrics import MetricsEndpoint, OnLoop
from quire.settings import RouterSettings
from quire.settings_loader import load
from router.metrics import router_metrics
from router.node import Node
from router.servicer import RouterServicer
from router.tenants import Tenants, tenants_of
from router.vllm_names import vllm_metrics

if TYPE_CHECKING:
    import grpc

_SERVICE = "quire.router.v1.RouterService"
_STOP_GRACE_S = 1.0

_logger = structlog.get_logger()


def main() -> int:
    """Run until SIGTERM or SIGINT; the process's exit status."""
    settings = load(RouterSettings, sys.argv[1:], prog="quire router")
    logs.configure(settings.log_level, settings.log_format, "router")
    try:
        asyncio.run(_serve(settings))
    except serving.StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


async def _serve(settings: RouterSettings) -> None:
    stop = asyncio.Event()
    serving.install_stop_signals(asyncio.get_running_loop(), stop)
    serving.end_with_parent(settings.parent_pid)
    tenants = tenants_of(settings)
    # The addresses are claimed before anything is waited for: a taken port shows at once.
    server = serving.create_server()
    addresses = [serving.bind(server, address) for address in settings.listen]
    metrics = MetricsEndpoint("router")
    try:
        metrics.start(settings.metrics_listen)
        await _serve_node(settings, tenants, server, addresses, metrics, stop)
    finally:
        metrics.stop()
        for address in addresses:
            serving.release_unix_path(address)


async def _serve_node(
    settings: RouterSettings,
    tenants: Tenants,
    server: grpc.aio.Server,
    addresses: list[str],
    metrics: MetricsEndpoint,
    stop: asyncio.Event,
) -> None:
    servicer = RouterServicer(tenants, settings.stream_interval_ms * 1e-3)
    reporter = serving.HealthReporter()
    router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, server)
    await reporter.add_to(server, [_SERVICE])
    # It answers before there is an engine: that it waits for one is no reason to start it again.
    await server.start()
    await reporter.set_started()
    try:
        node = await _connect_or_stop(settings, stop)
        if node is not None:
            _add_metrics(metrics, node, settings)
            servicer.serve(node)
            # What there is now stays: a search of it for garbage would hold up every stream.
            gc.collect()
            gc.freeze()
            _logger.info(
                "serving",
                addresses=addresses,
                metrics=metrics.address,
                model=node.served_model_name,
            )
            await _run(node, server, reporter, stop, settings.shutdown_grace_s)
    finally:
        # One that still runs when its loop ends leaves a trace on the user's screen; so does a call that is cut off.
        await server.stop(_STOP_GRACE_S)


async def _run(
    node: Node,
    server: grpc.aio.Server,
    reporter: serving.HealthReporter,
    stop: asyncio.Event,
    grace_s: float,
) -> None:
    """Run steps until `stop`, then drain."""
    steps = asyncio.create_task(node.run())
    steps.add_done_callback(lambda _: stop.set())
    await reporter.set_serving(serving=True)
    await stop.wait()
    await reporter.set_serving(serving=False)
    # Without steps no request ends by itself.
    await node.drain(0 if steps.done() else grace_s)
    await server.stop(_STOP_GRACE_S)
    steps.cancel()
    try:
        with suppress(asyncio.CancelledError):
            await steps
    finally:
        await node.close()


def _add_metrics(metrics: MetricsEndpoint, node: Node, settings: RouterSettings) -> None:
    reads = [router_metrics, vllm_metrics][: 2 if settings.metrics_compat == "vllm" else 1]
    # One collector for both, so that the second names tell of the same moment.
    families = OnLoop(
        asyncio.get_running_loop(), lambda: chain.from_iterable(read(node) for read in reads)
    )
    metrics.add(families)


async def _connect_or_stop(settings: RouterSettings, stop: asyncio.Event) -> Node | None:
    connecting = asyncio.create_task(Node.connect(settings))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({connecting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not connecting.done():
        connecting.cancel()
        return None
    return connecting.result()


if __name__ == "__main__":
    sys.exit(main())
