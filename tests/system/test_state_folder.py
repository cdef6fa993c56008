"""The memory service as a process with a state folder: what it refuses, and how it ends when it cannot write."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from processes import QUIRE, wait_until_serving

from protos.memory.v1 import memory_pb2, memory_pb2_grpc, pool_pb2, pool_pb2_grpc
from quire.descriptor import fetch_descriptor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IDENTITY = pool_pb2.PoolIdentity(
    layers=[pool_pb2.KvLayer(num_kv_heads=1, k_head_dim=4, v_head_dim=4)],
    dtype="float32",
    block_size=16,
    tensor_parallel_size=1,
    model_fingerprint="none",
)
ATTACH = pool_pb2.AttachPoolRequest(
    identity=IDENTITY, max_model_len=64, placement=pool_pb2.POOL_PLACEMENT_WRITER
)


def command(folder: Path, name: str) -> list[str]:
    """`quire memory` with the state folder of the test, and sockets of its own."""
    sockets = ("--listen", f"unix:{folder}/{name}", "--descriptor-socket", f"{folder}/{name}-fd")
    state = ("--state-dir", str(folder / "state"), "--memory-budget", "1MiB")
    return [QUIRE, "memory", *sockets, *state, "--log-level", "error", "--metrics-listen", "off"]


@contextmanager
def running_memory(
    folder: Path, *, limit_kib: str = "unlimited"
) -> Iterator[subprocess.Popen[str]]:
    """A service whose files may grow to `limit_kib`; killed at the end if it is still there."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", f'ulimit -f {limit_kib}; exec "$@"', "sh", *command(folder, "memory")],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with grpc.insecure_channel(f"unix:{folder}/memory") as channel:
            wait_until_serving(channel)
        yield process
    finally:
        process.kill()
        process.communicate()


def attach(folder: Path) -> pool_pb2.AttachPoolResponse:
    """Become the writer of a pool."""
    with grpc.insecure_channel(f"unix:{folder}/memory") as channel:
        attached = pool_pb2_grpc.PoolServiceStub(channel).AttachPool(ATTACH)
    fetch_descriptor(attached.descriptor_socket, attached.ticket).close()
    return attached


def welcomes(folder: Path, attached: pool_pb2.AttachPoolResponse) -> Iterator[int]:
    """Open one session after another; the generation of each."""
    with grpc.insecure_channel(f"unix:{folder}/memory") as channel:
        stub = memory_pb2_grpc.MemoryServiceStub(channel)
        for number in range(1000):
            hello = memory_pb2.SessionHello(
                session_id=f"router-{number:04}",
                pool_id=attached.pool_id,
                writer_generation=attached.writer_generation,
                max_num_rows=1,
            )
            answers = stub.Session(iter([memory_pb2.SessionRequest(hello=hello)]))
            yield next(answers).welcome.generation


def run(arguments: list[str]) -> tuple[int, str]:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr


def test_folder_has_one_service(tmp_path: Path) -> None:
    """A second service on the same folder ends with one line and status 1; the first one goes on."""
    with running_memory(tmp_path) as first:
        status, stderr = run(command(tmp_path, "second"))
        assert (status, stderr) == (
            1,
            f"error: the state folder {tmp_path}/state belongs to another memory service that runs\n",
        )
        assert first.poll() is None


def test_corrupt_log_is_refused(tmp_path: Path) -> None:
    """The service does not start on a log with a changed byte: one line with file, offset and the way out."""
    with running_memory(tmp_path) as service:
        attach(tmp_path)
        service.send_signal(signal.SIGKILL)
        service.wait()
    log = tmp_path / "state" / "log-0.quire"
    whole = bytearray(log.read_bytes())
    whole[20] ^= 1
    log.write_bytes(whole)
    status, stderr = run(command(tmp_path, "memory"))
    assert status == 1
    assert stderr == (
        f"error: {log} is corrupt at byte 0: the checksum of a frame's payload is wrong; "
        f"to start with an empty pool, move {tmp_path}/state away\n"
    )
    assert log.read_bytes() == whole


def test_full_disk_ends_the_service_before_it_answers(tmp_path: Path) -> None:
    """When a change cannot be written the service ends with status 1 and one line, and the change is not answered."""
    with running_memory(tmp_path, limit_kib="1") as service:
        attached = attach(tmp_path)
        told: list[int] = []
        with pytest.raises(grpc.RpcError) as caught:
            told.extend(welcomes(tmp_path, attached))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert service.wait(10) == 1
        assert service.stderr is not None
        log = tmp_path / "state" / "log-0.quire"
        assert service.stderr.read() == f"error: cannot write {log}: File too large\n"
    assert told == list(range(1, len(told) + 1))
    assert told
    listed = subprocess.run(
        [sys.executable, "-m", "memory_service.replay", str(log), "records", "--output", "json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert listed.stdout.count("session_opened") == len(told)
