"""A picture of the pool that stays up to date, across restarts of the service."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from quire.client.pool_mirror import PoolMirror
from quire.errors import BrokenContract, InvalidRequest, NotReady, QuireError

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.client.inspector import PoolInspector, Watch
    from quire.client.pool_view import MirrorView

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True)
class Link:
    """How the stream is doing."""

    is_up: bool = False
    was_up: bool = False  # ever
    away_s: float = 0.0  # since it broke; 0 while it is up or was not up yet
    error: QuireError | None = None  # why it broke or could not begin


class Watching:
    """Follows a Watch in a thread of its own for as long as the `with` block lasts.

    A stream that breaks is resumed with the last token, after a pause that doubles up to two seconds; what the service
    says that cannot be resumed begins with a snapshot again. Until then `look` shows the last picture.

    Args:
        inspector: what is watched; the caller closes it, after this.
        mirror: takes the answers in.
        clock: seconds that never decrease.
    """

    def __init__(
        self,
        inspector: PoolInspector,
        *,
        mirror: PoolMirror | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inspector = inspector
        self._mirror = mirror or PoolMirror()
        self._clock = clock
        self._lock = threading.Lock()  # of all below and of the mirror
        self._changed = threading.Condition(self._lock)
        self._watch: Watch | None = None
        self._is_up = self._was_up = False
        self._lost_at = 0.0
        self._error: QuireError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watching", daemon=True)

    def look(self) -> MirrorView | None:
        """The picture as of now; None before the first snapshot is whole."""
        with self._lock:
            return self._mirror.look()

    @property
    def link(self) -> Link:
        """How the stream is doing as of now."""
        with self._lock:
            return self._link()

    @property
    def num_missed(self) -> int:
        """Times that the service said that changes were missed."""
        with self._lock:
            return self._mirror.num_missed

    def wait(self, timeout_s: float) -> Link:
        """Wait until there is a picture or the first try failed, at most `timeout_s`; how the stream is doing then."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or self._mirror.has_view, timeout_s
            )
            return self._link()

    def close(self) -> None:
        """End the stream and its thread."""
        self._stop.set()
        with self._lock:
            watch = self._watch
        if watch is not None:
            watch.cancel()
        self._thread.join()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _link(self) -> Link:
        away_s = self._clock() - self._lost_at if self._was_up and not self._is_up else 0.0
        return Link(self._is_up, self._was_up, away_s, self._error)

    def _follow(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._stop.is_set():
            try:
                self._read_stream()
            except QuireError as error:
                pause_s = _FIRST_PAUSE_S if self._is_up else min(2 * pause_s, _LONGEST_PAUSE_S)
                self._note_loss(error)
            self._stop.wait(pause_s)

    def _read_stream(self) -> None:
        with self._lock:
            token = self._mirror.begin_stream()
            watch = self._watch = self._inspector.watch(resume_token=token)
        # `close` may have looked for a stream to cancel before there was this one.
        if self._stop.is_set():
            watch.cancel()
        with watch:
            if watch.wait_until_accepted():
                self._note_start()
            for answer in watch:
                with self._changed:
                    self._mirror.take(answer)
                    self._changed.notify_all()
        message = "the service ended the stream"
        raise NotReady(message)

    def _note_start(self) -> None:
        with self._lock:
            self._is_up = self._was_up = True
            self._error = None

    def _note_loss(self, error: QuireError) -> None:
        with self._changed:
            if self._is_up:
                self._lost_at = self._clock()
            self._is_up, self._error = False, error
            if isinstance(error, (BrokenContract, InvalidRequest)):
                self._mirror.forget()
            self._changed.notify_all()
