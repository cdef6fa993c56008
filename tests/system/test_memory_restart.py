"""The memory service killed and started again: what its state folder and the compute service keep for it."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from pools import folder_on_tmpfs
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
from tiny_checkpoints import make_checkpoint

from memory_service.pool_bytes import is_on_tmpfs
from protos.memory.v1 import inspection_pb2, inspection_pb2_grpc, pool_pb2, pool_pb2_grpc
from quire import demo_model
from quire.client import Client
from quire.rpc_status import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import psutil

    from protos.memory.v1.inspection_pb2 import GetPoolResponse

FLAGS = ("--memory-budget", "16MiB", "--dtype", "float32", "--log-level", "error")
INTERPRETER = Path(__file__).parents[1] / "support" / "compute_on_interpreter.py"
SIZE = 16
NUM_FULL_BLOCKS = 7
PROMPTS = [
    [(7 * row + position) % 250 + 3 for position in range(NUM_FULL_BLOCKS * SIZE + 1)]
    for row in range(4)
]
NUM_TOKENS = 200


@pytest.fixture
def on_tmpfs() -> Iterator[Path]:
    with folder_on_tmpfs() as found:
        yield found


@pytest.fixture
def state_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A state folder that keeps the pool's bytes, and one that does not."""
    if request.param == "tmpfs":
        return Path(request.getfixturevalue("on_tmpfs"))
    if is_on_tmpfs(tmp_path):
        pytest.skip("the temporary folder of this machine is tmpfs")
    return tmp_path


def by_day(kind: str) -> pytest.MarkDecorator:
    """Both kinds of state folder, the other one at night."""
    kinds = [
        pytest.param(found, marks=[] if found == kind else [pytest.mark.long])
        for found in ("tmpfs", "disk")
    ]
    return pytest.mark.parametrize("state_dir", kinds, indirect=True)


def complete(client: Client, prompt: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    answer = client.complete(
        prompt, temperature=0, max_tokens=num_tokens, ignore_eos=True, timeout_s=180
    )
    return list(answer.completions[0].token_ids)


def complete_all(client: Client, num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        return list(threads.map(lambda prompt: complete(client, prompt, num_tokens), PROMPTS))


def look(inspection: inspection_pb2_grpc.InspectionServiceStub) -> GetPoolResponse:
    """The pool, as soon as there is a memory service that has one."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return inspection.GetPool(inspection_pb2.GetPoolRequest(), timeout=5)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill(process: psutil.Process) -> None:
    """Kill, and wait until the system has forgotten the process."""
    process.kill()
    wait_for(lambda: not process.is_running())


def num_hits(pool: GetPoolResponse) -> int:
    return int(pool.num_prefix_hit_tokens)


def refusal_of_a_second_writer(address: str) -> str:
    layer = pool_pb2.KvLayer(num_kv_heads=1, k_head_dim=8, v_head_dim=8)
    identity = pool_pb2.PoolIdentity(layers=[layer], dtype="float32", block_size=SIZE)
    request = pool_pb2.AttachPoolRequest(identity=identity, max_model_len=SIZE)
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        pool_pb2_grpc.PoolServiceStub(channel).AttachPool(request, timeout=5)
    return from_rpc_error(caught.value).reason


@by_day("tmpfs")
def test_requests_and_cache_survive_a_killed_memory_service(state_dir: Path) -> None:
    """Killed twice under load: the same tokens, the same pool and writer; every full block still hits; nothing leaks."""
    flags = (*FLAGS, "--state-dir", str(state_dir))
    with (
        running_quire(demo_model.path(), *flags) as quire,
        Client(quire.addresses["router"]) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        expected = complete_all(client)
        before, compute = look(quire.inspection), children_of(quire)["compute_service"]
        running = thread.submit(complete_all, client)
        for _ in range(2):
            wait_for(lambda: look(quire.inspection).num_sequences == len(PROMPTS))
            assert not running.done()
            kill(children_of(quire)["memory_service"])
        assert running.result(timeout=180) == expected
        assert children_of(quire)["compute_service"].pid == compute.pid
        after = look(quire.inspection)
        assert (after.pool_id, after.epoch) == (before.pool_id, before.epoch)
        assert after.writer_generation == before.writer_generation
        assert after.writer_alive
        assert refusal_of_a_second_writer(quire.addresses["memory"]) == "WRITER_ALIVE"
        assert_every_full_block_hits(quire, client, [tokens[:1] for tokens in expected])
        assert_pool_is_idle(quire)


def assert_every_full_block_hits(quire: Quire, client: Client, expected: list[list[int]]) -> None:
    before = look(quire.inspection)
    assert complete_all(client, 1) == expected
    rise = num_hits(look(quire.inspection)) - num_hits(before)
    assert rise == len(PROMPTS) * NUM_FULL_BLOCKS * SIZE


@by_day("disk")
def test_requests_survive_the_death_of_both(state_dir: Path) -> None:
    """Memory and compute killed under load: the same tokens; on tmpfs from the same pool, elsewhere from a new one."""
    flags = (*FLAGS, "--state-dir", str(state_dir))
    with (
        running_quire(demo_model.path(), *flags) as quire,
        Client(quire.addresses["router"]) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        expected = complete_all(client)
        before, children = look(quire.inspection), children_of(quire)
        running = thread.submit(complete_all, client)
        wait_for(lambda: look(quire.inspection).num_sequences == len(PROMPTS))
        for name in ("memory_service", "compute_service"):
            children[name].kill()
        assert running.result(timeout=180) == expected
        after = look(quire.inspection)
        assert int(after.writer_generation) == int(before.writer_generation) + 1
        assert (after.pool_id == before.pool_id) == is_on_tmpfs(state_dir)
        assert_pool_is_idle(quire)


def test_a_second_run_finds_the_cache_of_the_first(on_tmpfs: Path) -> None:
    """`quire up` stopped and started again with one state folder: a new writer, the same pool, every full block hits."""
    flags = (*FLAGS, "--state-dir", str(on_tmpfs))
    with (
        running_quire(demo_model.path(), *flags) as quire,
        Client(quire.addresses["router"]) as client,
    ):
        expected = complete_all(client, 1)
        # A client hears of its end before memory does.
        assert_pool_is_idle(quire)
        before = look(quire.inspection)
    with (
        running_quire(demo_model.path(), *flags) as quire,
        Client(quire.addresses["router"]) as client,
    ):
        after = look(quire.inspection)
        assert (after.pool_id, after.epoch) == (before.pool_id, before.epoch)
        assert int(after.writer_generation) == int(before.writer_generation) + 1
        assert after.num_cached_blocks == before.num_cached_blocks
        assert_every_full_block_hits(quire, client, expected)


def test_one_state_folder_has_one_memory_service(tmp_path: Path, on_tmpfs: Path) -> None:
    """A second service is refused in one line that names the folder, and the first serves on."""
    flags = ("--metrics-listen", "off", "--state-dir", str(on_tmpfs))
    first, second = (
        ("--listen", f"unix:{tmp_path}/m{i}", "--descriptor-socket", f"{tmp_path}/d{i}")
        for i in range(2)
    )
    with (
        running_service("memory", *first, "--state-dir", str(on_tmpfs)),
        grpc.insecure_channel(f"unix:{tmp_path}/m0") as channel,
    ):
        wait_until_serving(channel)
        done = subprocess.run(
            [QUIRE, "memory", *second, *flags],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert str(on_tmpfs) in done.stderr
        assert done.stderr.count("\n") == 1
        wait_until_serving(channel)


def test_compute_ends_when_its_pool_is_not_known_any_more(tmp_path: Path) -> None:
    """A memory service that starts without the state of before refuses the resumption, and compute waits no longer."""
    memory, compute = f"unix:{tmp_path}/m", f"unix:{tmp_path}/c"
    memory_flags = ("--listen", memory, "--descriptor-socket", f"{tmp_path}/d")
    first = start_service("memory", *memory_flags)
    writer = start_service("compute", "--listen", compute, "--memory-address", memory)
    with grpc.insecure_channel(compute) as channel:
        wait_until_serving(channel)
    first.kill()
    first.wait()
    with running_service("memory", *memory_flags):
        assert writer.wait(25) == 1  # its patience would end after thirty seconds


@pytest.mark.long
def test_a_pool_on_the_device_outlives_the_memory_service(tmp_path: Path) -> None:
    """A writer whose bytes are its own resumes without a descriptor: the same tokens, from hits in the same pool."""
    folder = make_checkpoint(tmp_path / "model", "llama", num_hidden_layers=1)
    memory, compute, router = (f"unix:{tmp_path}/{name}" for name in ("m", "c", "r"))
    memory_flags = ("--listen", memory, "--descriptor-socket", f"{tmp_path}/d")
    memory_flags += ("--memory-budget", "1MiB", "--state-dir", str(tmp_path / "state"))
    compute_flags = ("--listen", compute, "--memory-address", memory, "--model", str(folder))
    compute_flags += ("--device", "cuda", "--max-model-len", "128", "--log-level", "error")
    writer = subprocess.Popen(
        [sys.executable, str(INTERPRETER), *compute_flags, "--metrics-listen", "off"]
    )
    prompt = list(range(5, 5 + 2 * SIZE + 1))
    first = start_service("memory", *memory_flags)
    with (
        running_service(
            "router", "--listen", router, "--memory-address", memory, "--compute-address", compute
        ),
        grpc.insecure_channel(memory) as channel,
        Client(router) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        with grpc.insecure_channel(router) as to_router:
            wait_until_serving(to_router, 120)
        inspection = inspection_pb2_grpc.InspectionServiceStub(channel)
        expected = complete(client, prompt, 24)
        before = look(inspection)
        running = thread.submit(complete, client, prompt, 24)
        wait_for(lambda: look(inspection).num_sequences == 1)
        first.kill()
        first.wait()
        with running_service("memory", *memory_flags):
            assert running.result(timeout=120) == expected
            after = look(inspection)
            assert (after.pool_id, after.placement) == (before.pool_id, "writer")
            assert after.writer_generation == before.writer_generation
            assert num_hits(after) > num_hits(before)
            writer.terminate()
            assert writer.wait(30) == 0
