"""The pool and its state folder: what happens to the one is kept in the other, and is found again after a restart."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

from memory_service.identity_codec import decode_identity, encode_identity
from memory_service.log_file import LogUnwritable
from memory_service.log_header import PoolDescription
from memory_service.record import WriterAttached

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from memory_service.block_manager import BlockManager
    from memory_service.log_header import LogHeader
    from memory_service.pool import Pool
    from memory_service.pool_registry import PoolRegistry
    from memory_service.record import Record
    from memory_service.recovery import FoldedState
    from memory_service.sessions import Sessions
    from memory_service.state_store import StateStore

_logger = structlog.get_logger()


class PoolKeeper:
    """Keeps the registry's pool in a store.

    Args:
        registry: whose pool is kept.
        store: where.
        end: ends the process at once. Called when a change could not be written: an answer that depends on it must not
            be sent, and the state in memory is not to be used any more.
    """

    def __init__(
        self,
        registry: PoolRegistry,
        store: StateStore,
        end: Callable[[LogUnwritable], NoReturn],
    ) -> None:
        self._registry = registry
        self._store = store
        self._end = end
        registry.when_created(self._created)
        registry.when_dropped(self._dropped)

    def restore(self, sessions: Sessions) -> None:
        """Put the pool of before in place, with its sessions, each of which may be resumed.

        Raises:
            StateError: when it cannot be told what it was.
        """
        started = time.perf_counter()
        found = self._store.recover(self._new_manager, self._registry.begin_books)
        if found is None:
            return
        self._restore_pool(found)
        sessions.restore()
        _logger.info(
            "recovered",
            seconds=round(time.perf_counter() - started, 3),
            revision=found.manager.revision,
            num_blocks=found.manager.pool.num_blocks,
            num_sequences=found.manager.num_sequences,
            num_bytes_cut=found.num_torn_bytes,
        )

    def _new_manager(self, header: LogHeader) -> BlockManager:
        pool = header.pool
        return self._registry.new_manager(
            header.pool_id,
            pool.num_blocks,
            pool.block_size,
            prefix_cache_enabled=pool.prefix_cache_enabled,
        )

    def _restore_pool(self, found: FoldedState) -> None:
        header, manager = found.header, found.manager
        generation, pid, started_ticks = manager.ledger.writer
        self._registry.restore(
            header.pool_id,
            decode_identity(header.pool.identity),
            manager,
            in_writers_memory=header.pool.in_writers_memory,
            writer=WriterAttached(generation, pid, started_ticks) if generation else None,
        )
        manager.on_record = self._append

    def tend(self) -> None:
        """Keep the folder small; call it now and then."""
        try:
            self._store.tend()
        except LogUnwritable as error:
            self._end(error)

    def _append(self, record: Record) -> None:
        try:
            self._store.append(record)
        except LogUnwritable as error:
            self._end(error)

    def _created(self, pool: Pool) -> None:
        description = PoolDescription(
            encode_identity(pool.identity),
            pool.manager.pool.num_blocks,
            pool.size_bytes,
            pool.manager.block_size,
            pool.manager.prefix_cache_enabled,
            pool.in_writers_memory,
        )
        try:
            self._store.begin(pool.pool_id, description)
        except LogUnwritable as error:
            self._end(error)
        pool.manager.on_record = self._append

    def _dropped(self, _: Pool) -> None:
        try:
            self._store.drop()
        except LogUnwritable as error:
            self._end(error)
