"""Watch as a stream: one hub for the pool that there is, and a loop for each who watches it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from memory_service.call_tenant import refuse_tenant
from memory_service.pool_messages import epoch_of
from memory_service.watch_hub import WatchHub
from memory_service.watch_messages import WatchMessages, parse_resume_token

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from typing import Protocol

    from memory_service import call_tenant
    from memory_service.pool import Pool
    from memory_service.pool_registry import PoolRegistry
    from memory_service.state_store import StateStore
    from memory_service.watch_hub import ResumePoint, RingBounds, Watcher
    from protos.memory.v1 import inspection_pb2 as pb

    class Call(call_tenant.Call, Protocol):
        """What of a servicer's context is needed here."""

        def send_initial_metadata(self, initial_metadata: tuple[()]) -> Awaitable[None]:
            """Tell the caller that the call was taken on."""


class Watching:
    """Lets callers watch the registry's pool, and the one after it.

    Args:
        registry: has the pool.
        store: of the state folder; None: nothing outlives the service.
        bounds: of what is kept for those who read slowly or come back.
        clock: seconds that never decrease.
    """

    def __init__(
        self,
        registry: PoolRegistry,
        store: StateStore | None,
        *,
        bounds: RingBounds | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._store = store
        self._bounds = bounds
        self._clock = clock
        self._hub: WatchHub[pb.WatchResponse] | None = None
        registry.when_dropped(self._dropped)

    @property
    def num_watchers(self) -> int:
        """Calls that watch."""
        return self._hub.num_watchers if self._hub else 0

    async def watch(self, token: str, call: Call) -> AsyncIterator[pb.WatchResponse]:
        """The answers to one call, until it is cancelled.

        Raises:
            InvalidRequest: for a token that was not given here, or for a call of one tenant.
            NoPool: when there is no pool, or none after the one that was watched.
        """
        # Which blocks change, and when, would tell a tenant what others do.
        refuse_tenant(call, "a watch shows the whole pool, all tenants' part of it")
        woken = asyncio.Event()
        watcher = self._join(parse_resume_token(token), woken)
        try:
            # Who resumes while nothing changes would else hear nothing, as from a service that is away.
            await call.send_initial_metadata(())
            while True:
                woken.clear()
                for answer in watcher.answers():
                    yield answer
                if watcher.is_over:
                    watcher = self._join(watcher.position, woken)
                else:
                    await woken.wait()
        finally:
            watcher.leave()

    def _join(self, start: ResumePoint | None, woken: asyncio.Event) -> Watcher[pb.WatchResponse]:
        pool = self._registry.pool
        if self._hub is None or self._hub.manager is not pool.manager:
            epoch = epoch_of(pool, self._store)
            self._hub = WatchHub(
                pool.manager, epoch, WatchMessages(), bounds=self._bounds, clock=self._clock
            )
        return self._hub.join(start, woken.set)

    def _dropped(self, _: Pool) -> None:
        if self._hub is not None:
            self._hub.close()
            self._hub = None
