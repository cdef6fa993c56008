"""A picture that stays up to date while the service comes and goes."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from naive_pool import NaivePool, NaiveSequence
from scripted_memory import ScriptedMemory, serving

from protos.memory.v1 import inspection_pb2 as pb
from quire.client import PoolInspector, Watching
from quire.errors import InvalidRequest, NoPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/memory.sock"


@pytest.fixture
def watching(address: str) -> Iterator[Watching]:
    with PoolInspector(address) as inspector, Watching(inspector) as found:
        yield found


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def revision(watching: Watching) -> str | None:
    view = watching.look()
    return view.revision if view else None


def started(pool: NaivePool) -> pb.WatchResponse:
    """One sequence more."""
    before = pool.copy()
    pool.revision += 1
    row = len(pool.sequences)
    pool.sequences["s", row] = NaiveSequence(f"a{row}/0", "red", [row + 1], 0)
    return pool.change_since(before, "s", pool.revision)


def test_a_broken_stream_is_resumed(address: str, watching: Watching) -> None:
    """The service ends and comes back: the last picture stays, and the stream goes on behind the last answer."""
    memory, pool = ScriptedMemory(), NaivePool(9)
    with serving(memory, address):
        memory.changes.put(pool.snapshot()[0])
        memory.changes.put(started(pool))
        until(lambda: revision(watching) == "1")
        assert watching.link.is_up
        assert watching.link.away_s == 0
    until(lambda: watching.link.away_s > 0.3)
    assert not watching.link.is_up
    assert watching.link.error is not None
    assert revision(watching) == "1"
    with serving(memory, address):
        # Nothing is sent: that the call was taken on is enough to know that the service is there.
        until(lambda: watching.link.is_up)
        memory.changes.put(started(pool))
        until(lambda: revision(watching) == "2")
    requests = [request for request, _ in memory.asked("Watch")]
    assert [request.resume_token for request in requests] == ["", "1:1"]


@pytest.mark.parametrize("why", ["unknown token", "broken contract"])
def test_what_cannot_be_resumed_begins_anew(why: str, address: str, watching: Watching) -> None:
    """A refused token, or a change that does not fit: the next stream asks for a snapshot."""
    memory, pool = ScriptedMemory(), NaivePool(9)
    with serving(memory, address):
        memory.changes.put(pool.snapshot()[0])
        until(lambda: revision(watching) == "0")
        if why == "unknown token":
            memory.changes.put(InvalidRequest("resume_token: is none that this service gave"))
        else:
            delta = pb.WatchDelta(ended=[pb.EndedSequence(row=5)])
            memory.changes.put(pb.WatchResponse(epoch="1", revision="8", delta=delta))
        until(lambda: len(memory.asked("Watch")) == 2)
        assert memory.asked("Watch")[1][0].resume_token == ""
        pool.revision = 9
        memory.changes.put(pool.snapshot()[0])
        until(lambda: revision(watching) == "9")


def test_a_service_without_a_pool_is_waited_for(address: str, watching: Watching) -> None:
    """NO_POOL is told, and the pool is seen once there is one."""
    memory, pool = ScriptedMemory(), NaivePool(9)
    memory.changes.put(NoPool("no pool was attached yet"))
    with serving(memory, address):
        until(lambda: isinstance(watching.link.error, NoPool))
        assert watching.look() is None
        memory.changes.put(pool.snapshot()[0])
        until(lambda: revision(watching) == "0")
        assert watching.link.error is None


def test_changes_that_were_missed_are_counted(address: str, watching: Watching) -> None:
    """`missed` and a snapshot in two parts: a new picture, one time fallen behind."""
    memory, pool = ScriptedMemory(), NaivePool(9)
    with serving(memory, address):
        for answer in (*pool.snapshot(), pool.missed(), *pool.snapshot(2), started(pool)):
            memory.changes.put(answer)
        until(lambda: revision(watching) == "1")
        assert watching.num_missed == 1


def test_it_ends_while_it_waits(address: str) -> None:
    """Closing takes no longer than a moment, with a service and without one."""
    memory = ScriptedMemory()
    with ExitStack() as stack, PoolInspector(address) as inspector:
        for _ in range(2):
            with Watching(inspector) as watching:
                watching.wait(0.5)
                began = time.monotonic()
            assert time.monotonic() - began < 1
            stack.enter_context(serving(memory, address))
