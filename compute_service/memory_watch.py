"""Notices the end of the memory service, and goes on with the one that comes after it, if that knows the pool again."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from quire.descriptor import DescriptorRefusedError
from quire.errors import QuireError

if TYPE_CHECKING:
    from collections.abc import Callable

    from compute_service.kv_pool import KvPool


class MemoryWatch:
    """Calls `when_gone`, on a thread of its own, once the socket that came with the pool ended and `resume` failed.

    Steps run on meanwhile: they touch nothing but blocks that were given to them before.
    """

    def __init__(
        self, pool: KvPool, resume: Callable[[], None], when_gone: Callable[[], None]
    ) -> None:
        self.why_gone: str | None = None  # None while the pool has a keeper, or may have one again
        self._pool = pool
        self._resume = resume
        self._when_gone = when_gone
        threading.Thread(target=self._run, name="memory-watch", daemon=True).start()

    def _run(self) -> None:
        why = "the watch of it failed"
        try:
            while True:
                self._until_end()
                self._resume()
        except (QuireError, DescriptorRefusedError) as error:
            why = str(error)
        finally:
            self.why_gone = why
            self._when_gone()

    def _until_end(self) -> None:
        # Nothing is ever sent on it.
        with suppress(OSError):
            while self._pool.descriptor.lifeline.recv(1):
                pass
