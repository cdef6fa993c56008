"""Whoever folds a Watch, however badly it reads, knows at every revision that it reaches what the books held then."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_faces import NUM_ROWS, Call, OneRouter, inspection_of, new_manager, registry_of
from naive_watcher import NaiveWatcher, expected_of, known_to
from pool_driver import PoolDriver
from pools import IDENTITY, MAX_MODEL_LEN, new_registry

from memory_service.record import ReleaseReason
from memory_service.watch_hub import ResumePoint, RingBounds, WatchHub
from memory_service.watch_messages import WatchMessages, parse_resume_token
from memory_service.watch_snapshot import Snapshot
from memory_service.watching import Watching
from protos.memory.v1 import inspection_pb2 as pb
from quire.client.pool_mirror import PoolMirror
from quire.errors import InvalidRequest, NoPool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memory_service.block_manager import BlockManager

SEEDS = st.integers(0, 1 << 30)
SMALL = RingBounds(num_changes=8)


class Listener:
    """A naive watcher and its connection, which it may lose, and which it reads as slowly as it likes."""

    def __init__(self, hub: WatchHub[pb.WatchResponse]) -> None:
        self.naive = NaiveWatcher()
        self._hub = hub
        self._connect()

    def _connect(self) -> None:
        self._watcher = self._hub.join(parse_resume_token(self.naive.token), lambda: None)
        self._answers: Iterator[pb.WatchResponse] = self._watcher.answers()

    def reconnect(self) -> None:
        """Lose the connection and resume."""
        self._watcher.leave()
        self.naive.disconnect()
        self._connect()

    def read(self, count: int = 1 << 30) -> None:
        """Take in at most `count` answers, and over the wire."""
        for _ in range(count):
            answer = next(self._answers, None)
            if answer is None:
                self._answers = self._watcher.answers()
                return
            self.naive.take(pb.WatchResponse.FromString(answer.SerializeToString()))


def hub_of(manager: BlockManager, bounds: RingBounds | None = None) -> WatchHub[pb.WatchResponse]:
    return WatchHub(manager, "epoch", WatchMessages(), bounds=bounds)


def history_of(manager: BlockManager) -> dict[int, dict[str, Any]]:
    """What a watcher must know, at each revision from now on."""
    found = {manager.revision: expected_of(manager)}
    manager.observers.append(lambda record: found.update({record.revision: expected_of(manager)}))
    return found


@settings(deadline=None, max_examples=25)
@given(SEEDS)
def test_every_watcher_knows_the_books_at_each_revision_that_it_reaches(seed: int) -> None:
    """One that reads all at once, one that reads little and loses its connection, and the client's own mirror."""
    choose = random.Random(seed)  # noqa: S311 -- the same at every run
    driver = PoolDriver(new_manager(30, min_partial_tokens=2), seed)
    for _ in range(choose.randrange(40)):
        driver.act()
    manager = driver.manager
    history, hub = history_of(manager), hub_of(manager, SMALL)
    listeners = [Listener(hub), Listener(hub)]
    for _ in range(80):
        driver.act()
        listeners[0].read()
        assert listeners[0].naive.revision == manager.revision
        if choose.random() < 0.3:
            listeners[1].read(choose.randrange(12))
        if choose.random() < 0.1:
            listeners[1].reconnect()
        for listener in listeners:
            naive = listener.naive
            if not naive.must_begin:
                assert known_to(naive) == history[naive.revision]
    assert listeners[0].naive.num_snapshots == 1
    listeners[1].read()
    assert listeners[1].naive.revision == manager.revision


@settings(deadline=None, max_examples=10)
@given(SEEDS)
def test_the_clients_mirror_folds_to_the_same(seed: int) -> None:
    """What `quire top` shows is what the books hold, after every change."""
    driver = PoolDriver(new_manager(30, min_partial_tokens=2), seed)
    mirror, hub = PoolMirror(), hub_of(driver.manager)
    watcher = hub.join(None, lambda: None)
    for _ in range(100):
        driver.act()
        for answer in watcher.answers():
            mirror.take(answer)
        view, expected = mirror.look(), expected_of(driver.manager)
        assert view is not None
        blocks = zip(view.states.tolist(), view.ref_counts.tolist(), strict=True)
        assert dict(enumerate(blocks)) == expected["blocks"]
        assert {key: found.block_table for key, found in view.sequences.items()} == expected[
            "tables"
        ]
        assert view.counts.num_used_blocks == expected["counts"].get("num_used_blocks", 0)
        assert view.tenants.keys() == expected["tenants"].keys()


def one_busy_sequence(num_blocks: int = 4000) -> tuple[BlockManager, OneRouter]:
    manager = new_manager(num_blocks)
    return manager, OneRouter(manager)


def test_who_falls_out_of_the_ring_is_told_and_gets_a_new_snapshot() -> None:
    """Nine changes do not fit a ring of eight; eight do."""
    manager, router = one_busy_sequence()
    listener = Listener(hub_of(manager, SMALL))
    listener.read()
    for _ in range(4):
        router.cache(
            [1, 2, 3]
        )  # admitted, computed, released: three changes; one of them is no new block
        assert manager.revision - listener.naive.revision <= 12
    listener.read()
    assert (listener.naive.num_missed, listener.naive.num_snapshots) == (1, 2)
    before = manager.revision
    while manager.revision < before + 8:
        manager.attach_writer(1, 2, 3)
    listener.read()
    assert (listener.naive.num_missed, listener.naive.num_deltas) == (1, 8)


def test_the_ring_is_bounded_in_bytes() -> None:
    """Many large changes push each other out, one that is too large is not kept at all."""
    manager, router = one_busy_sequence()
    hub = hub_of(manager, RingBounds(num_bytes=20_000, change_bytes=9000))
    listener = Listener(hub)
    for first in range(10):
        router.run(first % NUM_ROWS, list(range(1000 * first, 1000 * first + 400)))
        router.release(first % NUM_ROWS)
    assert 1 <= hub.num_kept < 30
    router.run(0, list(range(90_000, 98_000)))
    listener.read()
    assert known_to(listener.naive) == expected_of(manager)
    listener.read()
    router.release(0)
    assert hub.num_kept == 0
    listener.read()
    assert listener.naive.num_missed == 1
    assert known_to(listener.naive) == expected_of(manager)


def test_a_token_resumes_where_it_left_off_also_after_a_restart() -> None:
    """Nothing is sent twice; a hub that was just made knows a token of the revision that its books have."""
    manager, router = one_busy_sequence()
    first = Listener(hub_of(manager))
    first.read()
    router.run(0, [1, 2, 3])
    first.reconnect()
    first.read()
    assert (first.naive.num_snapshots, first.naive.num_missed) == (1, 0)
    second = Listener(hub_of(manager))
    second.naive, second._hub = first.naive, hub_of(manager)
    second.reconnect()
    router.release(0)
    second.read()
    assert (second.naive.num_snapshots, second.naive.num_missed) == (1, 0)
    assert known_to(second.naive) == expected_of(manager)


@pytest.mark.parametrize("start", [ResumePoint("other", 1), ResumePoint("epoch", 99)])
def test_a_token_of_what_is_not_known_begins_anew(start: ResumePoint) -> None:
    """Of another epoch, or of a revision that never was."""
    manager, _ = one_busy_sequence()
    answers = list(hub_of(manager).join(start, lambda: None).answers())
    assert [found.WhichOneof("content") for found in answers[:2]] == ["missed", "snapshot"]
    assert answers[0].missed.last_revision == ("" if start.epoch == "other" else "99")
    assert [found.snapshot.last for found in answers[1:]][-1]


@pytest.mark.parametrize("token", ["epoch", ":5", "epoch:", "epoch:-1", "epoch:" + "9" * 19])
def test_a_token_that_was_never_given_is_refused(token: str) -> None:
    """INVALID_REQUEST names the field."""
    with pytest.raises(InvalidRequest, match="resume_token"):
        parse_resume_token(token)


def test_a_change_is_made_a_message_once_for_all() -> None:
    """Two watchers send the very same message."""
    manager, router = one_busy_sequence()
    hub = hub_of(manager)
    watchers = [hub.join(None, lambda: None) for _ in range(2)]
    for watcher in watchers:
        list(watcher.answers())
    router.run(0, [1, 2, 3])
    one, other = (list(watcher.answers()) for watcher in watchers)
    assert len(one) == 2
    assert all(mine is yours for mine, yours in zip(one, other, strict=True))


def test_nobody_listens_to_the_books_a_minute_after_the_last_watcher() -> None:
    """Until then a watcher that comes back resumes; then the ring is gone, and a step tells nobody."""
    manager, router = one_busy_sequence()
    now = [100.0]
    hub = WatchHub(manager, "epoch", WatchMessages(), clock=lambda: now[0])
    assert manager.observers == []
    watcher = hub.join(None, lambda: None)
    watcher.leave()
    watcher.leave()
    now[0] = 159.0
    router.run(0, [1, 2, 3])
    assert (len(manager.observers), hub.num_watchers, hub.num_kept) == (1, 0, 2)
    now[0] = 161.0
    router.release(0)
    assert (manager.observers, hub.num_kept) == ([], 0)
    answers = list(hub.join(ResumePoint("epoch", manager.revision - 1), lambda: None).answers())
    assert answers[0].WhichOneof("content") == "missed"


def test_an_ended_sequence_says_why() -> None:
    """Each reason in the words of the contract; a session that ends takes its sequences along as lapsed."""
    manager, router = one_busy_sequence()
    watcher = hub_of(manager).join(None, lambda: None)
    for row, _ in enumerate(ReleaseReason):
        router.admit(row, [row, 1, 2])
    list(watcher.answers())
    told = [found for found in ReleaseReason if found is not ReleaseReason.LAPSED]
    router.apply(releases=tuple(range(len(told))), release_reasons=tuple(told))
    manager.close_session(router.key)
    step, end = (found.delta for found in watcher.answers())
    reasons = ["unspecified", "finished", "preempted", "cancelled", "failed", "resumed"]
    assert [(found.row, found.reason) for found in step.ended] == list(enumerate(reasons))
    assert [(found.sequence_id, found.reason) for found in end.ended] == [("s6", "lapsed")]
    assert (end.session_id, end.step, step.event) == ("router", "0", "")
    assert end.event == "Session 'router' ended; all that it held returned to the pool."


def test_a_snapshot_of_a_million_blocks_is_copied_in_milliseconds_and_sent_in_small_parts() -> None:
    """Even when no two neighbours are alike."""
    manager = new_manager(1_000_000)
    manager.pool.ref_counts[1:] = np.arange(1, 1_000_000) % 3 + 1
    seconds = []
    for _ in range(20):
        started = time.process_time()
        snapshot = Snapshot.of(manager)
        seconds.append(time.process_time() - started)
    sizes, num_blocks = [], 0
    for part in snapshot.parts():
        message = WatchMessages().of_part("epoch", snapshot, part)
        sizes.append(message.ByteSize())
        num_blocks += sum(run.num_blocks for run in message.snapshot.block_runs)
    assert num_blocks == 1_000_000
    assert max(sizes) < 1 << 20
    assert min(seconds) < 0.005


# As a stream


async def first_answers(answers: Any, count: int) -> list[pb.WatchResponse]:
    async with asyncio.timeout(5):
        return [await anext(answers) for _ in range(count)]


def test_a_watcher_wakes_for_each_change_and_leaves_nothing_behind() -> None:
    """A stream that is closed, even while it waits, is counted no more."""

    async def watch() -> None:
        registry = registry_of(new_manager(30))
        router = OneRouter(registry.pool.manager)
        watching: Any = Watching(registry, None)  # type: ignore[arg-type]
        async with aclosing(watching.watch("", Call())) as answers:
            *_, last = await first_answers(answers, 2)
            assert last.snapshot.last
            waiting = asyncio.create_task(first_answers(answers, 1))
            await asyncio.sleep(0.01)
            router.admit(0, [1, 2, 3])
            (delta,) = await waiting
            assert delta.delta.started[0].sequence.sequence_id == "s0"
            assert watching.num_watchers == 1
            waiting = asyncio.create_task(first_answers(answers, 1))
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        assert watching.num_watchers == 0

    asyncio.run(watch())


def test_a_watcher_goes_on_with_the_pool_after_this_one() -> None:
    """It is told that it missed something, of an epoch of its own; without a pool its stream ends with NO_POOL."""

    async def watch() -> None:
        registry = new_registry()
        watching = Watching(registry, None)
        with pytest.raises(NoPool):
            await anext(watching.watch("", Call()))
        registry.attach(IDENTITY, MAX_MODEL_LEN, in_writers_memory=True)
        first = registry.pool
        async with aclosing(watching.watch("", Call())) as answers:
            *_, last = await first_answers(answers, 2)
            assert (last.epoch, last.snapshot.last) == (first.pool_id, True)
            # Nobody took its ticket: the writer after it gets another pool.
            registry._place.give_up()
            registry.attach(IDENTITY, MAX_MODEL_LEN, in_writers_memory=True)
            assert registry.pool is not first
            missed, *_, last = await first_answers(answers, 3)
            assert missed.missed == pb.WatchMissed()
            assert missed.WhichOneof("content") == "missed"
            assert (last.epoch, last.snapshot.last) == (registry.pool.pool_id, True)
            registry._drop()
            with pytest.raises(NoPool):
                await anext(answers)

    asyncio.run(watch())


@pytest.mark.parametrize("tenant", ["", "blue"])
def test_a_call_of_one_tenant_may_not_watch(tenant: str) -> None:
    """The whole pool is shown, or nothing."""

    async def watch() -> None:
        servicer = inspection_of(registry_of(new_manager(30)))
        with pytest.raises(InvalidRequest, match="quire-tenant"):
            await anext(servicer.Watch(pb.WatchRequest(), Call(tenant)))  # type: ignore[arg-type]

    asyncio.run(watch())
