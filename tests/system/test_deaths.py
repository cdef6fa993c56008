"""Processes killed with real signals."""

from __future__ import annotations

import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import psutil
import pytest
from processes import (
    QUIRE,
    Quire,
    assert_pool_is_idle,
    children_of,
    running_quire,
    running_service,
    start_service,
    wait_until_serving,
)

from protos.router.v1 import router_pb2
from quire import demo_model
from quire.client import Client, QuireError

if TYPE_CHECKING:
    from collections.abc import Iterator

FLAGS = ("--memory-budget", "16MiB", "--dtype", "float32", "--log-level", "error")
PROMPTS = [f"def function_{i}(value):\n    return " for i in range(6)]


@pytest.fixture
def own_quire() -> Iterator[Quire]:
    """Services of this test alone."""
    with running_quire(demo_model.path(), *FLAGS) as found:
        yield found


def complete_all(client: Client) -> list[list[int]]:
    def complete(seed: int) -> list[int]:
        answer = client.complete(PROMPTS[seed], seed=seed, max_tokens=200, ignore_eos=True)
        return list(answer.completions[0].token_ids)

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(complete, range(len(PROMPTS))))


def complete_one(client: Client) -> list[int]:
    answer = client.complete(PROMPTS[0], seed=1, max_tokens=300, ignore_eos=True)
    return list(answer.completions[0].token_ids)


def test_requests_survive_a_killed_compute_service(own_quire: Quire) -> None:
    """After kill -9 of compute under load, `quire up` starts it again; every request ends with the same tokens."""
    with Client(own_quire.addresses["router"]) as client:
        expected = complete_all(client)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(complete_all, client)
            time.sleep(0.5)
            assert not running.done()
            children_of(own_quire)["compute_service"].send_signal(signal.SIGKILL)
            assert running.result(timeout=90) == expected
    assert_pool_is_idle(own_quire)


def test_a_killed_router_is_replaced(own_quire: Quire) -> None:
    """After kill -9 of the router, its clients get an error, its blocks return, a new one serves."""
    with Client(own_quire.addresses["router"]) as client:
        generation = client.generate(PROMPTS[0], max_tokens=400, ignore_eos=True)
        next(generation)
        children_of(own_quire)["router"].send_signal(signal.SIGKILL)
        with pytest.raises(QuireError):
            list(generation)
        assert _completes_within(client, 30)
    assert_pool_is_idle(own_quire)


def _completes_within(client: Client, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            return bool(client.complete(PROMPTS[0], max_tokens=4, timeout_s=10).completions)
        except QuireError:
            time.sleep(0.2)
    return False


def start_up(*flags: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    process = subprocess.Popen(
        [QUIRE, "up", "--listen", "127.0.0.1:0", *FLAGS, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("ready ")
    return process, dict(part.split("=", 1) for part in line.split()[1:])


def finish(process: subprocess.Popen[str]) -> str:
    _, error = process.communicate(timeout=60)
    return error


def test_nothing_outlives_a_killed_up() -> None:
    """After kill -9 of `quire up` itself, all three services end by themselves."""
    process, _ = start_up()
    children = psutil.Process(process.pid).children()
    assert len(children) == 3
    process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    finish(process)


def test_the_end_of_memory_ends_up_in_one_line() -> None:
    """After kill -9 of the memory service, its pool is gone, so all ends, with one line that says so."""
    process, _ = start_up()
    children = {child.cmdline()[2]: child for child in psutil.Process(process.pid).children()}
    children["memory_service"].send_signal(signal.SIGKILL)
    error = finish(process)
    assert process.returncode == 1
    assert error == "error: memory_service was killed by SIGKILL\n"
    assert not any(child.is_running() for child in children.values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C under load: status 0, no process, no socket, no shared-memory file, no output."""
    process, addresses = start_up("--state-dir", str(tmp_path), "--shutdown-grace-s", "0.5")
    children = psutil.Process(process.pid).children()
    with Client(addresses["router"]) as client:
        next(client.generate(PROMPTS[0], max_tokens=1000, ignore_eos=True))
        process.send_signal(number)
        assert finish(process) == ""
    assert process.returncode == 0
    assert not any(child.is_running() for child in children)
    folder = Path(addresses["memory"].removeprefix("unix:")).parent
    assert not folder.exists()


def test_memory_and_compute_may_be_replaced_under_a_router(tmp_path: Path) -> None:
    """After kill -9 of an unsupervised memory service compute ends too; both started again, requests end the same."""
    memory, compute, router = (f"unix:{tmp_path}/{name}" for name in ("m", "c", "r"))
    memory_flags = ("--listen", memory, "--descriptor-socket", f"{tmp_path}/d")
    memory_flags += ("--shutdown-grace-s", "1")  # at the end the router still holds its session
    compute_flags = ("--listen", compute, "--memory-address", memory, "--dtype", "float32")
    compute_flags += ("--memory-patience-s", "0.5")
    router_flags = ("--listen", router, "--memory-address", memory, "--compute-address", compute)
    with (
        running_service("router", *router_flags),
        Client(router) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        first_memory, first_compute = (
            start_service("memory", *memory_flags),
            start_service("compute", *compute_flags),
        )
        with grpc.insecure_channel(router) as channel:
            wait_until_serving(channel)
        expected = complete_one(client)
        running = pool.submit(complete_one, client)
        time.sleep(0.3)
        assert not running.done()
        first_memory.kill()
        assert (first_memory.wait(10), first_compute.wait(30)) == (-signal.SIGKILL, 1)
        with running_service("memory", *memory_flags), running_service("compute", *compute_flags):
            assert running.result(timeout=90) == expected


def test_a_router_ends_when_the_engine_comes_back_another(tmp_path: Path) -> None:
    """Requests were checked against the old pool and would wait for ever in a smaller one: one line, and status 1."""
    memory, compute, router = (f"unix:{tmp_path}/{name}" for name in ("m", "c", "r"))
    memory_flags = ("--listen", memory, "--descriptor-socket", f"{tmp_path}/d")
    compute_flags = ("--listen", compute, "--memory-address", memory, "--memory-patience-s", "0.5")
    router_flags = ("--listen", router, "--memory-address", memory, "--compute-address", compute)
    command = [QUIRE, "router", "--log-level", "error", "--metrics-listen", "off", *router_flags]
    first_memory = start_service("memory", *memory_flags, "--memory-budget", "16MiB")
    first_compute = start_service("compute", *compute_flags)
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
        grpc.insecure_channel(router) as channel,
        Client(router) as client,
    ):
        wait_until_serving(channel)
        client.complete("a", max_tokens=2)
        first_memory.kill()
        assert (first_memory.wait(10), first_compute.wait(30)) == (-signal.SIGKILL, 1)
        smaller = (*memory_flags, "--memory-budget", "12MiB")
        with running_service("memory", *smaller), running_service("compute", *compute_flags):
            (cut_off,) = client.complete("a", max_tokens=2, timeout_s=60).completions
            assert cut_off.finished.finish_reason == router_pb2.FINISH_REASON_CANCELLED
            assert process.wait(60) == 1
        assert process.stderr is not None
        told = process.stderr.read().strip()
    assert told.startswith("error: the engine came back with other settings")
    assert len(told.splitlines()) == 1
