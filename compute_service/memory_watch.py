"""Notices the end of the memory service: the pool's books are lost with it, and only a new attachment gets new ones."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable


class MemoryWatch:
    """Calls `when_gone`, on a thread of its own, once the socket that came with the pool ends."""

    def __init__(self, lifeline: socket.socket, when_gone: Callable[[], None]) -> None:
        self.is_gone = False
        self._lifeline = lifeline
        self._when_gone = when_gone
        threading.Thread(target=self._run, name="memory-watch", daemon=True).start()

    def _run(self) -> None:
        # Nothing is ever sent on it.
        with suppress(OSError):
            while self._lifeline.recv(1):
                pass
        self.is_gone = True
        self._when_gone()
