"""Who may write to the pool, and what a restart of the memory service leaves of both."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from pools import (
    BUDGET_BYTES,
    IDENTITY,
    MAX_MODEL_LEN,
    Clock,
    are_same_file,
    folder_on_tmpfs,
    new_registry,
    own_process,
    restarted,
    started_ticks,
)

from memory_service.record import WriterAttached
from memory_service.writer_place import TicketRefused
from memory_service.writer_process import UNKNOWN_PROCESS, WriterProcess
from quire.errors import NoPool, PoolMismatch, WriterAlive

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from memory_service.pool import Attachment
    from memory_service.pool_registry import PoolRegistry

UNSEEN = WriterAttached(1, 0, 0)
GRACE_S = 10.0


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_on_tmpfs() as found:
        yield found


def attach(registry: PoolRegistry, **changes: object) -> Attachment:
    return registry.attach(replace(IDENTITY, **changes), MAX_MODEL_LEN)


def attach_and_fetch(registry: PoolRegistry, process: WriterProcess = UNKNOWN_PROCESS) -> int:
    """Become the writer; its generation."""
    attached = attach(registry)
    registry.redeem(attached.ticket, process)
    return attached.writer_generation


def a_dead_process(*, reaped: bool) -> tuple[WriterAttached, subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = started_ticks(child.pid)
    child.kill()
    if reaped:
        child.wait()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    return WriterAttached(1, child.pid, started), child


def test_listeners_hear_in_order() -> None:
    """A new pool and each new writer are told before the answer; an old pool's sessions end before it is dropped."""
    registry, heard = new_registry(), []
    registry.when_replaced(lambda: heard.append(("replaced", registry.pool.pool_id)))
    registry.when_created(lambda pool: heard.append(("created", pool.pool_id)))
    registry.when_dropped(lambda pool: heard.append(("dropped", pool.pool_id)))
    registry.when_writer_attached(lambda writer: heard.append(("writer", writer)))
    first = attach(registry)
    registry.redeem(first.ticket, WriterProcess(7, 8))
    registry.writer_gone(1)
    second = attach(registry, model_fingerprint="other")
    registry.redeem(second.ticket, UNKNOWN_PROCESS)
    before, after = first.pool.pool_id, second.pool.pool_id
    assert heard == [
        ("created", before),
        ("writer", WriterAttached(1, 7, 8)),
        ("replaced", before),
        ("dropped", before),
        ("created", after),
        ("writer", WriterAttached(2, 0, 0)),
    ]
    registry.close()


def test_a_ticket_is_good_once_and_not_for_long() -> None:
    """A used, a late, a guessed and an unreadable ticket are refused."""
    clock = Clock()
    registry = new_registry(clock=clock)
    ticket = attach(registry).ticket
    for wrong in ("", "guessed", "\N{REPLACEMENT CHARACTER}"):
        with pytest.raises(TicketRefused):
            registry.redeem(wrong, UNKNOWN_PROCESS)
    registry.redeem(ticket, UNKNOWN_PROCESS)
    with pytest.raises(TicketRefused):
        registry.redeem(ticket, UNKNOWN_PROCESS)
    registry.writer_gone(1)
    late = attach(registry).ticket
    clock.now += 31
    with pytest.raises(TicketRefused):
        registry.redeem(late, UNKNOWN_PROCESS)
    registry.close()


def test_the_writer_of_before_goes_on_with_its_generation(folder: Path) -> None:
    """After a restart the bytes are the same file, and who resumes keeps its generation without being logged again."""
    before, heard = new_registry(folder), []
    attach_and_fetch(before)
    after = restarted(before, own_process(), folder)
    after.when_writer_attached(heard.append)
    pool_id, held = before.pool.pool_id, before.pool.fd
    assert after.whole_pool.pool_id == pool_id
    resumed = after.resume(IDENTITY, pool_id, 1)
    assert (resumed.writer_generation, resumed.is_warm) == (1, True)
    own = own_process()
    pool, writer = after.redeem(resumed.ticket, WriterProcess(own.pid, own.started_ticks), held)
    assert (writer.generation, writer.is_connected, heard) == (1, True, [])
    assert are_same_file(pool.fd, held)
    assert pool.fd != held
    with pytest.raises(WriterAlive, match="nothing to resume"):
        after.resume(IDENTITY, pool_id, 1)
    after.writer_gone(1)
    assert attach(after).writer_generation == 2
    before.close()
    after.close()


def test_only_what_was_there_is_resumed(folder: Path) -> None:
    """Another pool, another identity, another generation and an empty service are POOL_MISMATCH."""
    before = new_registry(folder)
    attach_and_fetch(before)
    after, pool_id = restarted(before, UNSEEN, folder), before.pool.pool_id
    for identity, asked, generation in (
        (IDENTITY, "other", 1),
        (replace(IDENTITY, dtype="float16"), pool_id, 1),
        (IDENTITY, pool_id, 2),
    ):
        with pytest.raises(PoolMismatch):
            after.resume(identity, asked, generation)
    with pytest.raises(PoolMismatch, match="there is none"):
        new_registry().resume(IDENTITY, pool_id, 1)
    after.resume(IDENTITY, pool_id, 1)
    before.close()
    after.close()


def test_a_running_writer_of_before_keeps_others_out(folder: Path) -> None:
    """While its process runs nobody else is let in, however long it takes to resume."""
    clock, before = Clock(), new_registry(folder)
    attach_and_fetch(before)
    after = restarted(before, own_process(), folder, clock=clock)
    clock.now += 100 * GRACE_S
    with pytest.raises(WriterAlive) as refused:
        attach(after)
    assert refused.value.metadata == {"writer_generation": "1"}
    before.close()
    after.close()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_dead_writer_of_before_keeps_nobody_out(folder: Path, *, reaped: bool) -> None:
    """Once its process is dead, a zombie included, the next writer gets the same pool at once."""
    before = new_registry(folder)
    attach_and_fetch(before)
    dead, child = a_dead_process(reaped=reaped)
    after = restarted(before, dead, folder)
    attached = attach(after)
    assert (attached.writer_generation, attached.is_warm) == (2, True)
    assert attached.pool.pool_id == before.pool.pool_id
    child.communicate()
    before.close()
    after.close()


def test_a_recycled_process_id_is_another_process(folder: Path) -> None:
    """A living process that began at another time than the writer is not taken for it."""
    before = new_registry(folder)
    attach_and_fetch(before)
    own = own_process()
    after = restarted(before, replace(own, started_ticks=own.started_ticks - 1), folder)
    assert attach(after).is_warm
    before.close()
    after.close()


def test_a_writer_that_cannot_be_seen_has_a_grace_time(folder: Path) -> None:
    """Without a process id others wait ten seconds for it, then they are let in."""
    clock, before = Clock(), new_registry(folder)
    attach_and_fetch(before)
    after = restarted(before, UNSEEN, folder, clock=clock)
    clock.now += GRACE_S - 0.1
    with pytest.raises(WriterAlive):
        attach(after)
    clock.now += 0.1
    assert attach(after).is_warm
    before.close()
    after.close()


def test_missing_bytes_are_handed_back() -> None:
    """Until the writer of before brings its descriptor no session may open; then the bytes are the same again."""
    before = new_registry()
    attach_and_fetch(before)
    assert before.pool.fd is not None
    os.pwrite(before.pool.fd, b"kept", 8192)
    after = restarted(before, own_process())
    with pytest.raises(NoPool, match="missing until the compute service hands them back"):
        _ = after.whole_pool
    assert after.pool.manager.pool.num_blocks == before.pool.manager.pool.num_blocks
    ticket = after.resume(IDENTITY, before.pool.pool_id, 1).ticket
    after.redeem(ticket, UNKNOWN_PROCESS, before.pool.fd)
    before.close()
    assert after.whole_pool.fd is not None
    assert os.pread(after.whole_pool.fd, 4, 8192) == b"kept"
    after.close()


def test_other_bytes_are_not_taken_for_the_pool(folder: Path) -> None:
    """No descriptor, one of another pool, and one of a copy are refused; the right one is still good after that."""
    before, other = new_registry(folder), new_registry()
    attach_and_fetch(before)
    attach_and_fetch(other)
    after = restarted(before, own_process(), folder)
    assert before.pool.fd is not None
    copy = os.memfd_create("copy")
    os.sendfile(copy, before.pool.fd, 0, os.fstat(before.pool.fd).st_size)
    for held, why in (
        (None, "there is none"),
        (other.pool.fd, "it holds pool"),
        (copy, "of another file"),
    ):
        ticket = after.resume(IDENTITY, before.pool.pool_id, 1).ticket
        with pytest.raises(TicketRefused, match=why):
            after.redeem(ticket, UNKNOWN_PROCESS, held)
    ticket = after.resume(IDENTITY, before.pool.pool_id, 1).ticket
    after.redeem(ticket, UNKNOWN_PROCESS, before.pool.fd)
    os.close(copy)
    for registry in (before, other, after):
        registry.close()


def test_bytes_that_nobody_brings_back_are_given_up() -> None:
    """After the grace time the pool is dropped, its sessions end, and the next writer gets a new one."""
    clock, heard, before = Clock(), [], new_registry()
    attach_and_fetch(before)
    after, pool_id = restarted(before, own_process(), clock=clock), before.pool.pool_id
    after.when_replaced(lambda: heard.append("replaced"))
    after.when_dropped(lambda pool: heard.append(pool.pool_id))
    clock.now += GRACE_S - 0.1
    after.drop_lost_pool()
    assert heard == []
    clock.now += 0.1
    after.drop_lost_pool()
    assert heard == ["replaced", pool_id]
    with pytest.raises(PoolMismatch):
        after.resume(IDENTITY, pool_id, 1)
    attached = attach(after)
    assert (attached.writer_generation, attached.is_warm) == (2, False)
    assert attached.pool.pool_id != pool_id
    before.close()
    after.close()


def test_a_writer_on_its_way_back_is_waited_for() -> None:
    """A ticket to resume that was given out within the grace time outlasts it."""
    clock, before = Clock(), new_registry()
    attach_and_fetch(before)
    after = restarted(before, UNSEEN, clock=clock)
    ticket = after.resume(IDENTITY, before.pool.pool_id, 1).ticket
    clock.now += GRACE_S + 1
    after.drop_lost_pool()
    after.redeem(ticket, UNKNOWN_PROCESS, before.pool.fd)
    assert after.whole_pool.pool_id == before.pool.pool_id
    before.close()
    after.close()


def test_bytes_of_a_dead_writer_are_given_up_at_once() -> None:
    """When the only process that had them is dead, nobody waits."""
    before = new_registry()
    attach_and_fetch(before)
    dead, child = a_dead_process(reaped=True)
    after = restarted(before, dead)
    assert not attach(after).is_warm
    child.communicate()
    before.close()
    after.close()


def test_bytes_that_lie_with_the_writer_need_no_descriptor() -> None:
    """A writer with a pool of its own resumes with the ticket alone; before that the pool counts as missing."""
    before = new_registry()
    attached = before.attach(IDENTITY, MAX_MODEL_LEN, in_writers_memory=True)
    before.redeem(attached.ticket, UNKNOWN_PROCESS)
    after = restarted(before, own_process())
    with pytest.raises(NoPool):
        _ = after.whole_pool
    ticket = after.resume(IDENTITY, attached.pool.pool_id, 1).ticket
    pool, _ = after.redeem(ticket, UNKNOWN_PROCESS)
    assert pool.fd is None
    assert after.whole_pool is pool


@pytest.mark.parametrize(
    "changes", [{"budget_bytes": BUDGET_BYTES // 2}, {"prefix_cache_enabled": False}]
)
def test_other_settings_after_a_restart_make_another_pool(
    folder: Path, changes: dict[str, object]
) -> None:
    """What was recovered is of no use to a new writer when the settings ask for another pool now."""
    before = new_registry(folder)
    attach_and_fetch(before)
    dead, child = a_dead_process(reaped=True)
    after = new_registry(folder, **changes)
    pool = before.pool
    manager = before.new_manager(pool.pool_id, pool.manager.pool.num_blocks, 16)
    after.restore(pool.pool_id, IDENTITY, manager, in_writers_memory=False, writer=dead)
    attached = attach(after)
    assert not attached.is_warm
    assert attached.pool.pool_id != pool.pool_id
    child.communicate()
    before.close()
    after.close()
