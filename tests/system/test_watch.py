"""Watch and Explain against real processes: slow readers cost nobody anything, and what is told is what there is."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import psutil
import pytest
from processes import children_of, running_quire
from streams import Stream

from bench.decode_load import DecodeLoad, as_message
from bench.running_memory import RunningMemory
from protos.memory.v1 import inspection_pb2 as pb
from protos.memory.v1 import inspection_pb2_grpc, memory_pb2, memory_pb2_grpc
from quire import demo_model
from quire.client import Client
from quire.client.inspector import PoolInspector
from quire.client.watching import Watching
from quire.errors import QuireError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.client.pool_view import MirrorView

NUM_SEQS = 32
NUM_KEPT = 4096  # changes in the service's ring
MIB = 1 << 20


class Decoding:
    """A router whose sequences decode, a token each step."""

    def __init__(self, memory: RunningMemory, channel: grpc.Channel) -> None:
        self._stream = Stream(memory_pb2_grpc.MemoryServiceStub(channel).Session)
        hello = memory_pb2.SessionHello(
            session_id="decoding",
            pool_id=memory.attached.pool_id,
            writer_generation=memory.attached.writer_generation,
            max_num_rows=NUM_SEQS,
        )
        answer = self._stream.ask(memory_pb2.SessionRequest(hello=hello))
        self._generation = answer.welcome.generation
        self._load = DecodeLoad(NUM_SEQS)
        for demand in self._load.admissions():
            self._stream.ask(as_message(demand, self._generation))

    def step(self) -> None:
        """One step, answered."""
        answer = self._stream.ask(as_message(self._load.next_step(), self._generation)).answer
        assert not answer.refusals

    def run_for(self, seconds: float) -> int:
        """Steps that were answered in this time."""
        count, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            self.step()
            count += 1
        return count

    def run(self, count: int) -> None:
        """So many steps."""
        for _ in range(count):
            self.step()

    def close(self) -> None:
        """End the session."""
        self._stream.close(memory_pb2.SessionRequest(goodbye=memory_pb2.SessionGoodbye()))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[RunningMemory]:
    with RunningMemory.started(tmp_path, 200_000) as found:
        yield found


@contextmanager
def decoding(memory: RunningMemory) -> Iterator[tuple[Decoding, grpc.Channel]]:
    """A router at work, and a channel for those who watch."""
    # A connection of its own, as another process has it. gRPC would let its buffer grow to megabytes: with that off, who
    # does not read is behind soon.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    with (
        grpc.insecure_channel(memory.address) as to_memory,
        grpc.insecure_channel(memory.address, options) as channel,
    ):
        found = Decoding(memory, to_memory)
        yield found, channel
        found.close()


def test_a_watcher_that_never_reads_slows_nobody_down(memory: RunningMemory) -> None:
    """In turns with and without it about as many steps are answered; memory stays bounded; in the end it is told."""
    process = psutil.Process(memory.process.pid)
    with decoding(memory) as (router, channel):
        stub = inspection_pb2_grpc.InspectionServiceStub(channel)
        router.run_for(1)
        num_without = num_with = 0
        for _ in range(4):
            num_without += router.run_for(0.7)
            watch = stub.Watch(pb.WatchRequest())
            assert next(watch).HasField("snapshot")
            num_with += router.run_for(0.7)
            watch.cancel()
        assert num_with > 0.6 * num_without
        watch = stub.Watch(pb.WatchRequest())
        while not next(watch).snapshot.last:
            pass
        router.run(NUM_KEPT)
        with_full_ring = process.memory_info().rss
        router.run(NUM_KEPT)
        assert process.memory_info().rss - with_full_ring < 16 * MIB
        newest = int(stub.GetPool(pb.GetPoolRequest()).revision)
        answers = takewhile(lambda answer: not answer.HasField("missed"), watch)
        *_, last = answers
        assert int(last.revision) < newest - NUM_KEPT
        for answer in watch:
            if answer.snapshot.last:
                break
        assert int(answer.revision) == newest
        watch.cancel()


def test_a_stopped_watcher_is_told_and_gets_the_state(memory: RunningMemory) -> None:
    """SIGSTOP, more changes than are kept, SIGCONT: it missed some, and then knows the newest revision."""
    script = Path(__file__).parents[1] / "support" / "watching_client.py"
    command = [sys.executable, str(script), memory.address]
    with decoding(memory) as (router, channel):
        client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert client.stdout is not None
        try:
            assert client.stdout.readline().split()[1] == "0"
            router.run(10)
            client.send_signal(signal.SIGSTOP)
            router.run(NUM_KEPT + 1000)
            client.send_signal(signal.SIGCONT)
            stub = inspection_pb2_grpc.InspectionServiceStub(channel)
            newest = stub.GetPool(pb.GetPoolRequest()).revision
            for line in client.stdout:
                revision, num_missed = line.split()
                if revision == newest:
                    break
            assert (revision, num_missed) == (newest, "1")
        finally:
            client.kill()
            client.wait()
            client.stdout.close()


# Under a whole Quire


def agrees(view: MirrorView | None, inspector: PoolInspector) -> bool:
    """Whether the picture is what the unary calls show; False when something changed meanwhile."""
    pool = inspector.get_pool()
    if view is None or view.revision != pool.revision:
        return False
    sequences = {(one.session_id, one.row): one for one in inspector.list_sequences()}
    blocks = list(inspector.list_blocks())
    if inspector.get_pool().revision != pool.revision:
        return False
    assert view.epoch == pool.epoch
    assert view.sequences.keys() == sequences.keys()
    assert [(one.state, one.ref_count) for one in blocks] == list(
        zip(view.states.tolist(), view.ref_counts.tolist(), strict=True)
    )
    assert (view.counts.num_free_blocks, view.counts.num_cached_blocks) == (
        pool.num_free_blocks,
        pool.num_cached_blocks,
    )
    assert view.counts.num_evictions == int(pool.num_evictions)
    return True


def wait_until_it_agrees(watching: Watching, inspector: PoolInspector) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if agrees(watching.look(), inspector):
                return
        except QuireError as error:  # the service is away
            assert error.code == "UNAVAILABLE", error  # noqa: PT017 -- any other is a failure
        assert time.monotonic() < deadline
        time.sleep(0.05)


def generate(client: Client, count: int) -> None:
    """Requests that evict each other's blocks."""
    prompts = [[(row * 31 + position) % 250 + 3 for position in range(150)] for row in range(count)]

    def complete(prompt: list[int]) -> None:
        client.complete(prompt, temperature=0, max_tokens=40, ignore_eos=True, timeout_s=180)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(complete, prompts))


def test_the_mirror_of_a_serving_pool_is_the_pool_also_after_it_was_killed(tmp_path: Path) -> None:
    """Under load that preempts and evicts, and across kill -9 with a state folder; what happened can be explained."""
    flags = ("--memory-budget", "1MiB", "--dtype", "float32", "--log-level", "error")
    with (
        running_quire(
            demo_model.path(), *flags, "--max-model-len", "256", "--state-dir", str(tmp_path)
        ) as quire,
        Client(quire.addresses["router"]) as client,
        PoolInspector(quire.addresses["memory"]) as inspector,
        Watching(inspector) as watching,
    ):
        generate(client, 14)
        wait_until_it_agrees(watching, inspector)
        pool = inspector.get_pool()
        assert int(pool.num_evictions) > 0
        evicted = evictions_of(inspector, pool.num_blocks)
        assert evicted
        assert all("idle for" in found.reason for found in evicted)
        children_of(quire)["memory_service"].kill()
        generate(client, 6)
        wait_until_it_agrees(watching, inspector)
        again = evictions_of(inspector, pool.num_blocks)
        assert {(one.revision, one.reason) for one in evicted} <= {
            (one.revision, one.reason) for one in again
        }
        assert watching.link.is_up


def evictions_of(inspector: PoolInspector, num_blocks: int) -> list[pb.Explanation]:
    return [
        found
        for block_id in range(num_blocks)
        for found in inspector.explain(block_id=block_id).explanations
    ]
