"""The changes of a pool for all who watch it: a ring of the newest ones, and a place in it for each watcher."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from memory_service.watch_snapshot import Snapshot, SnapshotPart
from memory_service.watched_change import ChangeReader, WatchedChange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memory_service.block_manager import BlockManager
    from memory_service.record import Record

MessageT = TypeVar("MessageT")
MessageT_co = TypeVar("MessageT_co", covariant=True)


class Messages(Protocol[MessageT_co]):
    """Makes what watchers send."""

    def of_change(self, epoch: str, change: WatchedChange) -> MessageT_co:
        """One change."""

    def of_part(self, epoch: str, snapshot: Snapshot, part: SnapshotPart) -> MessageT_co:
        """A part of a snapshot."""

    def of_missed(self, epoch: str, last_revision: int | None) -> MessageT_co:
        """Changes were missed; None: the epoch is another one."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The state that a watcher has."""

    epoch: str
    revision: int


@dataclass(frozen=True, slots=True)
class RingBounds:
    """What the ring keeps at most.

    A change that would not make a message of bounded size is not kept: who needs it gets a snapshot, in parts.
    """

    num_changes: int = 4096
    num_bytes: int = 32 << 20
    change_bytes: int = 1 << 20
    idle_s: float = 60.0  # without watchers; then nothing is kept until somebody comes


@dataclass(slots=True)
class _Kept(Generic[MessageT]):
    """A change in the ring: as values until the first watcher sends it, as a message for all others."""

    num_bytes: int
    change: WatchedChange | None
    message: MessageT | None = None


class WatchHub(Generic[MessageT]):
    """Lets any number of watchers follow one pool.

    Nobody is waited for and nothing is queued for anybody: the hub keeps the newest changes, a watcher knows the revision
    that it has sent. One that fell out of the ring is told so and gets a new snapshot. A change is read off the books
    once and made a message at most once. While nobody watched for a while, the hub does not listen to the books at all.

    Args:
        manager: of the pool.
        epoch: of its revisions.
        messages: makes what is sent.
        bounds: of the ring.
        clock: seconds that never decrease.
    """

    def __init__(
        self,
        manager: BlockManager,
        epoch: str,
        messages: Messages[MessageT],
        *,
        bounds: RingBounds | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.manager = manager
        self.epoch = epoch
        self.messages = messages
        self.is_closed = False
        self._bounds = bounds or RingBounds()
        self._clock = clock
        self._reader: ChangeReader | None = None  # None: nobody listens
        self._ring: dict[int, _Kept[MessageT]] = {}  # by revision, without a gap up to the newest
        self._num_bytes = 0
        self._watchers: set[Watcher[MessageT]] = set()
        self._left_at = 0.0  # when the last watcher left

    @property
    def num_watchers(self) -> int:
        """Those that were not cancelled."""
        return len(self._watchers)

    @property
    def num_kept(self) -> int:
        """Changes in the ring."""
        return len(self._ring)

    def join(self, start: ResumePoint | None, wake: Callable[[], None]) -> Watcher[MessageT]:
        """A watcher that goes on from `start`, or begins with a snapshot. `wake` is called when there is more to send."""
        if self._reader is None:
            self._reader = ChangeReader(self.manager)
            self.manager.observers = [*self.manager.observers, self._hear]
        watcher = Watcher(self, start, wake)
        self._watchers.add(watcher)
        return watcher

    def leave(self, watcher: Watcher[MessageT]) -> None:
        """The watcher sends nothing any more."""
        self._watchers.discard(watcher)
        self._left_at = self._clock()

    def close(self) -> None:
        """The pool is over: watchers wake to go elsewhere."""
        self.is_closed = True
        self._stop_listening()
        for watcher in self._watchers:
            watcher.wake()

    def has_all_after(self, revision: int) -> bool:
        """Whether every change that was made after `revision` is at hand."""
        newest = self.manager.revision
        return newest - len(self._ring) <= revision <= newest

    def message(self, revision: int) -> MessageT:
        """The change that led to `revision`, which is at hand."""
        kept = self._ring[revision]
        if kept.message is None:
            assert kept.change is not None
            kept.message, kept.change = self.messages.of_change(self.epoch, kept.change), None
        return kept.message

    def _hear(self, record: Record) -> None:
        if not self._watchers and self._clock() - self._left_at > self._bounds.idle_s:
            self._stop_listening()
            return
        assert self._reader is not None
        self._keep(self._reader.read(record))
        for watcher in self._watchers:
            watcher.wake()

    def _keep(self, change: WatchedChange) -> None:
        num_bytes = change.num_bytes
        if num_bytes > self._bounds.change_bytes:
            self._clear()
            return
        self._ring[change.revision] = _Kept(num_bytes, change)
        self._num_bytes += num_bytes
        while (
            len(self._ring) > self._bounds.num_changes or self._num_bytes > self._bounds.num_bytes
        ):
            oldest = change.revision + 1 - len(self._ring)
            self._num_bytes -= self._ring.pop(oldest).num_bytes

    def _clear(self) -> None:
        self._ring.clear()
        self._num_bytes = 0

    def _stop_listening(self) -> None:
        # Another list: the manager may be going through this one.
        self.manager.observers = [found for found in self.manager.observers if found != self._hear]
        self._reader = None
        self._clear()


class Watcher(Generic[MessageT]):
    """One who watches: what it has sent, and what comes next."""

    def __init__(
        self, hub: WatchHub[MessageT], start: ResumePoint | None, wake: Callable[[], None]
    ) -> None:
        self.wake = wake
        self._hub = hub
        self._has_state = start is not None and start.epoch == hub.epoch
        self._sent = start.revision if start is not None and self._has_state else None
        self._must_tell = start is not None and not self._has_state

    @property
    def is_over(self) -> bool:
        """Whether its pool gave way to another one."""
        return self._hub.is_closed

    @property
    def position(self) -> ResumePoint:
        """Where it stands; to go on with another pool."""
        return ResumePoint(self._hub.epoch, self._sent or 0)

    def leave(self) -> None:
        """Send nothing any more; may be said twice."""
        self._hub.leave(self)

    def answers(self) -> Iterator[MessageT]:
        """All that is to be sent now. What happens while it is sent comes along."""
        hub = self._hub
        while not hub.is_closed:
            if self._sent is None or not hub.has_all_after(self._sent):
                yield from self._begin_anew()
            elif self._sent == hub.manager.revision:
                return
            else:
                message = hub.message(self._sent + 1)
                self._sent += 1
                yield message

    def _begin_anew(self) -> Iterator[MessageT]:
        hub = self._hub
        if self._must_tell or self._sent is not None:
            yield hub.messages.of_missed(hub.epoch, self._sent)
        snapshot = Snapshot.of(hub.manager)
        for part in snapshot.parts():
            yield hub.messages.of_part(hub.epoch, snapshot, part)
        self._sent, self._must_tell = snapshot.revision, False
