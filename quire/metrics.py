"""Prometheus metrics of a process: the HTTP endpoint, and numbers of ours as metric families.

Nothing is counted here. Services count in plain numbers and `quire.distribution`; a collector makes families of them when
somebody scrapes.
"""

from __future__ import annotations

import socket
import socketserver
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.utils import floatToGoString

from quire import __version__
from quire.serving import StartupError, resolve
from quire.settings import OFF

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Mapping
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector

    from quire.distribution import Distribution

_OPEN_METRICS = "application/openmetrics-text"
_PATH = "/metrics"
_logger = structlog.get_logger()
_CLIENT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 5.0


def counter(name: str, meaning: str, value: float) -> Metric:
    """A counter; `_total` is added to its name."""
    return CounterMetricFamily(name, meaning, value=value)


def counters(name: str, meaning: str, label: str, values: Mapping[str, float]) -> Metric:
    """A counter for each value of `label`."""
    family = CounterMetricFamily(name, meaning, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def gauge(name: str, meaning: str, value: float) -> Metric:
    """A number that rises and falls."""
    return GaugeMetricFamily(name, meaning, value=value)


def gauges(name: str, meaning: str, label: str, values: Mapping[str, float]) -> Metric:
    """A gauge for each value of `label`."""
    family = GaugeMetricFamily(name, meaning, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def info(name: str, meaning: str, labels: Mapping[str, str]) -> Metric:
    """The gauge 1 whose labels tell something; its name ends in `_info`."""
    family = GaugeMetricFamily(name, meaning, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family


def histogram(name: str, meaning: str, found: Distribution) -> Metric:
    """A distribution."""
    family = HistogramMetricFamily(name, meaning)
    family.add_metric([], _buckets(found), found.sum)
    return family


def histograms(
    name: str, meaning: str, label: str, distributions: Mapping[str, Distribution]
) -> Metric:
    """A distribution for each value of `label`."""
    family = HistogramMetricFamily(name, meaning, labels=[label])
    for key, found in distributions.items():
        family.add_metric([key], _buckets(found), found.sum)
    return family


def _buckets(found: Distribution) -> list[tuple[str, float]]:
    bounds = [*map(floatToGoString, found.bounds), "+Inf"]
    return list(zip(bounds, found.cumulative(), strict=True))


class OnLoop:
    """A collector that reads on an event loop, between two of its callbacks: all its numbers are of one moment."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, read: Callable[[], Iterable[Metric]]
    ) -> None:
        self._loop = loop
        self._read = read

    def collect(self) -> list[Metric]:
        """The families; raises RuntimeError or TimeoutError when the loop ends or is stuck."""
        answer: Future[list[Metric]] = Future()
        self._loop.call_soon_threadsafe(self._answer, answer)
        return answer.result(_READ_TIMEOUT_S)

    def _answer(self, answer: Future[list[Metric]]) -> None:
        try:
            answer.set_result(list(self._read()))
        except Exception as error:  # noqa: BLE001 -- carried to the thread that asked
            answer.set_exception(error)


class _BuildInfo:
    """Which version of which service answers."""

    def __init__(self, service: str) -> None:
        self._service = service

    def collect(self) -> list[Metric]:
        labels = {"version": __version__, "service": self._service}
        return [info("quire_build_info", "Version and service that answer; always 1.", labels)]


class MetricsEndpoint:
    """Serves `GET /metrics` of one process, on a thread of its own; with its own registry."""

    def __init__(self, service: str) -> None:
        self.address = OFF  # with the port that was given out
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_BuildInfo(service))
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def add(self, collector: Collector) -> None:
        """From now on answers hold the families of `collector` too."""
        self._registry.register(collector)

    def start(self, address: str) -> None:
        """Answer on `address`; "off" does nothing.

        Raises:
            StartupError: when the address is taken or malformed.
        """
        if address == OFF:
            return
        server = _listen(address)
        server.set_app(_only_metrics(make_wsgi_app(self._registry)))
        self._server = server
        self._thread = threading.Thread(target=server.serve, name="metrics", daemon=True)
        self._thread.start()
        self.address = f"{address.rpartition(':')[0]}:{server.server_port}"

    def stop(self) -> None:
        """Close the port; what is being answered may end."""
        if self._server is not None and self._thread is not None:
            self._server.stop()
            self._thread.join()
            self._server = None


def _listen(address: str) -> _Server:
    try:
        return _Server(*resolve(address))
    except ValueError as error:
        message = f"cannot serve metrics on {address!r}: write host:port or {OFF}"
        raise StartupError(message) from error
    except OSError as error:
        message = f"cannot serve metrics on {address}: {error.strerror}"
        raise StartupError(message) from error


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread for each scrape, so that a slow one holds up nobody."""

    daemon_threads = True

    def __init__(self, family: int, where: tuple[Any, ...]) -> None:
        self.address_family = family
        self._is_stopping = False
        super().__init__(where, _Handler)

    def server_bind(self) -> None:
        """Bind without `HTTPServer`'s look at the name service, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def serve(self) -> None:
        """Answer until stopped. `serve_forever` would wake up twice a second to see whether it was."""
        while not self._is_stopping:
            self.handle_request()
        self.server_close()

    def stop(self) -> None:
        """Let `serve` return."""
        self._is_stopping = True
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which waits for a connection

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no matter for our log."""


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_TIMEOUT_S

    def log_message(self, *_arguments: object) -> None:
        """Log no scrape."""


def _only_metrics(metrics: WSGIApplication) -> WSGIApplication:
    """The library answers on every path; a wrong one should be seen."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] != _PATH:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [f"metrics are at {_PATH}\n".encode()]
        if _OPEN_METRICS in environ.get("HTTP_ACCEPT", ""):
            # Without the last word the library turns the colons of vLLM's names into underscores.
            environ["HTTP_ACCEPT"] = f"{_OPEN_METRICS};version=1.0.0;escaping=allow-utf-8"
        try:
            return metrics(environ, start_response)
        except (RuntimeError, TimeoutError):  # of OnLoop
            status, reason = "503 Service Unavailable", b"the service is ending, or stuck\n"
        except Exception:  # a defect of ours; the library would print a trace
            _logger.exception("scrape_failed")
            status, reason = "500 Internal Server Error", b"the service's log says why\n"
        start_response(status, [("Content-Type", "text/plain")])
        return [reason]

    return answer
