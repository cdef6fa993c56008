"""The HTTP endpoint of metrics, histograms, and which addresses `quire up` gives to them."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import structlog
from processes import free_port
from prometheus_client import Histogram
from prometheus_client.registry import CollectorRegistry

from quire import __version__
from quire.cli.ports import metrics_addresses, router_address
from quire.distribution import REQUEST_BOUNDS_S, STEP_BOUNDS_S, TOKEN_GAP_BOUNDS_S, Distribution
from quire.metrics import MetricsEndpoint, OnLoop, gauge, histogram
from quire.serving import StartupError
from quire.settings import MemorySettings
from quire.settings_loader import load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prometheus_client.metrics_core import Metric

VALUES = (0.0005, 0.001, 0.0011, 0.02, 0.5, 2.5, 99.0)


@pytest.fixture
def endpoint() -> Iterator[MetricsEndpoint]:
    served = MetricsEndpoint("router")
    served.start("127.0.0.1:0")
    yield served
    served.stop()


def get(
    address: str, path: str = "/metrics", method: str = "GET", **headers: str
) -> tuple[int, str, bytes]:
    """Status, type and body."""
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers["Content-Type"], body


def test_the_text_format_tells_version_and_process(endpoint: MetricsEndpoint) -> None:
    """A service without numbers of its own tells who it is and what its process uses."""
    status, kind, body = get(endpoint.address)
    assert (status, kind.split(";")[0]) == (200, "text/plain")
    build = f'quire_build_info{{service="router",version="{__version__}"}} 1.0'
    assert build in body.decode().splitlines()
    assert b"process_resident_memory_bytes" in body


def test_open_metrics_and_compression_on_request(endpoint: MetricsEndpoint) -> None:
    """`Accept` and `Accept-Encoding` are heeded, as Prometheus sends them."""
    accepted = {"Accept": "application/openmetrics-text; version=1.0.0"}
    _, kind, body = get(endpoint.address, **accepted)
    assert kind.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    _, _, packed = get(endpoint.address, **{"Accept-Encoding": "gzip"})
    assert b"quire_build_info" in gzip.decompress(packed)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/metric", 404), ("POST", "/metrics", 405)],
)
def test_nothing_else_is_answered(
    method: str, path: str, status: int, endpoint: MetricsEndpoint
) -> None:
    """Another path or method is an error, not a page of metrics."""
    found, _, body = get(endpoint.address, path, method)
    assert found == status
    assert b"quire_" not in body


def test_a_stopped_endpoint_leaves_its_port_and_no_thread(
    endpoint: MetricsEndpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    """The port is free at once, even with a client that never said anything; nothing is printed."""
    host, port = endpoint.address.split(":")
    with socket.create_connection((host, int(port))):
        get(endpoint.address)
        endpoint.stop()
        assert not any(thread.name == "metrics" for thread in threading.enumerate())
        again = MetricsEndpoint("router")
        again.start(endpoint.address)
        again.stop()
    assert capfd.readouterr() == ("", "")


# What Prometheus 2 and 3 send.
PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.2"
)


@pytest.mark.parametrize(
    "accept", ["", "application/openmetrics-text", "text/plain", PROMETHEUS_2, PROMETHEUS_3]
)
def test_a_colon_in_a_name_stays_one(accept: str, endpoint: MetricsEndpoint) -> None:
    """Names of vLLM have one; whoever scrapes finds it in every line, whatever it accepts."""

    class Collector:
        def collect(self) -> list[Metric]:
            return [gauge("vllm:num_requests_running", "Of a test.", 3)]

    endpoint.add(Collector())
    _, _, body = get(endpoint.address, Accept=accept)
    assert b"\nvllm:num_requests_running 3.0\n" in body
    assert b"vllm_" not in body


def test_a_client_that_goes_away_is_no_matter(
    endpoint: MetricsEndpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    """A connection that ends in the middle of a request leaves no trace on stderr; others are answered."""
    host, port = endpoint.address.split(":")
    for sent in (b"", b"GET /metr", b"\x00\xff\r\n\r\n"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(sent)
    assert get(endpoint.address)[0] == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("address", ["7081", "somewhere:http", "127.0.0.1:99999"])
def test_an_address_that_makes_no_sense_is_named(address: str) -> None:
    """One line that holds the address."""
    with pytest.raises(StartupError, match=f"cannot serve metrics on .*{address}"):
        MetricsEndpoint("router").start(address)


def test_ipv6_is_served() -> None:
    """An address in brackets works."""
    served = MetricsEndpoint("router")
    served.start("[::1]:0")
    assert get(served.address)[0] == 200
    served.stop()


def test_numbers_are_read_on_the_loop(endpoint: MetricsEndpoint) -> None:
    """A collector runs on the service's loop; once that has ended, a scrape is answered by 503."""
    seen: list[str] = []

    def read() -> list[object]:
        seen.append(threading.current_thread().name)
        return [gauge("quire_test", "A test.", 7)]

    async def scrape() -> bytes:
        endpoint.add(OnLoop(asyncio.get_running_loop(), read))
        return (await asyncio.to_thread(get, endpoint.address))[2]

    assert b"quire_test 7.0" in asyncio.run(scrape())
    assert seen == [threading.main_thread().name]
    assert get(endpoint.address)[0] == 503


def test_a_collector_that_fails_is_one_record(
    endpoint: MetricsEndpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    """A defect is an error for who scrapes, and one record in the log, not a loose trace."""

    class Broken:
        def collect(self) -> list[object]:
            raise KeyError("broken")

    endpoint.add(Broken())
    with structlog.testing.capture_logs() as records:
        assert get(endpoint.address)[0] == 500
    assert [record["event"] for record in records] == ["scrape_failed"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("bounds", [TOKEN_GAP_BOUNDS_S, STEP_BOUNDS_S, REQUEST_BOUNDS_S])
def test_a_distribution_is_the_librarys_histogram(bounds: tuple[float, ...]) -> None:
    """The same values give the same buckets, sum and count as `prometheus_client.Histogram`, on a bound too."""
    ours = Distribution(bounds)
    theirs = Histogram("x", "x", buckets=bounds, registry=CollectorRegistry())
    for value in VALUES:
        ours.observe(value)
        theirs.observe(value)
    (family,) = theirs.collect()
    expected = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    found = {
        (sample.name, sample.labels.get("le")): sample.value
        for sample in histogram("x", "x", ours).samples
    }
    assert found == expected
    assert ours.count == len(VALUES)


def test_gaps_below_10_ms_are_told_apart() -> None:
    """Fast models have gaps of a few milliseconds."""
    assert sum(bound < 0.01 for bound in TOKEN_GAP_BOUNDS_S) >= 5
    assert list(TOKEN_GAP_BOUNDS_S) == sorted(TOKEN_GAP_BOUNDS_S)


def test_off_is_a_word_in_yaml_too(tmp_path: Path) -> None:
    """`metrics_listen: off` would be the boolean false."""
    file = tmp_path / "quire.yaml"
    file.write_text("metrics_listen: off\n")
    found = load(MemorySettings, ["--config", str(file)], prog="quire memory")
    assert found.metrics_listen == "off"


def test_up_counts_from_a_named_port() -> None:
    """Router, memory and compute get the port + 10, + 11 and + 12, on the same host."""
    port = free_port()
    found = metrics_addresses(f"127.0.0.1:{port}")
    expected = {
        name: f"127.0.0.1:{port + offset}"
        for name, offset in (("router", 10), ("memory", 11), ("compute", 12))
    }
    assert found == expected


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix:/tmp/router.sock", "127.0.0.1:65530"])
def test_up_takes_free_ports_where_none_is_named(listen: str) -> None:
    """Without a port, or with one that leaves no room above it, three different ones on the same host."""
    found = metrics_addresses(listen)
    assert len(set(found.values())) == 3
    for address in found.values():
        assert router_address(address) == address  # it can be listened on


def test_a_trace_is_logged_without_its_variables() -> None:
    """A record of an exception names frames, not what they held; libraries' records and warnings are JSON too."""
    program = """
import logging, warnings, structlog
from quire import logs
logs.configure("info", "json", "router")
def fail(prompt):
    raise ValueError("broken")
try:
    fail("a secret of the client")
except ValueError as error:
    structlog.get_logger().error("call_failed", exc_info=error)
    logging.getLogger("grpc").exception("of a library")
warnings.warn("careful")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "secret" not in done.stderr
    ours, theirs, warning = map(json.loads, done.stderr.splitlines())
    assert ours["exception"][0]["frames"][-1]["name"] == "fail"
    assert (theirs["logger"], theirs["level"], theirs["service"]) == ("grpc", "error", "router")
    assert "careful" in warning["event"]


def test_a_console_trace_has_no_variables_either() -> None:
    """What people read on a console is written without them as well."""
    program = """
import structlog
from quire import logs
logs.configure("info", "console", "router")
prompt = "a secret of " + "the client"
try:
    raise ValueError("broken")
except ValueError as error:
    structlog.get_logger().error("call_failed", exc_info=error)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "ValueError: broken" in done.stderr
    assert "a secret of the client" not in done.stderr
