"""The pool: its bytes, its books, and who may write to it."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

import structlog

from memory_service.block_hash import BlockHasher
from memory_service.block_manager import BlockManager
from memory_service.pool import Attachment, Pool
from memory_service.pool_bytes import create_pool_file
from memory_service.pool_identity import check_identity, num_blocks_within
from memory_service.record import WriterAttached
from memory_service.writer_place import TicketRefused, Writer, WriterPlace
from quire.errors import NoPool, PoolMismatch
from quire.pool_trailer import WrongPoolBytesError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import NoReturn

    from memory_service.pool_identity import PoolIdentity
    from memory_service.writer_process import WriterProcess

_logger = structlog.get_logger()


class PoolRegistry:
    """One pool at a time. A writer of another identity gets another pool once the old writer is gone.

    Args:
        budget_bytes: most that a pool may take.
        secret: what keys of blocks are made with; a restarted service needs the same one.
        state_dir: folder that outlives the service; None: nothing does.
        prefix_cache_enabled: whether prefixes are cached.
        min_partial_tokens: a partly matching block is copied when it saves so many tokens; 0: never.
        on_broken: called when a change of the books failed half way; None: the error is raised.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        secret: bytes,
        state_dir: Path | None = None,
        prefix_cache_enabled: bool = True,
        min_partial_tokens: int = 0,
        on_broken: Callable[[Exception], NoReturn] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget_bytes = budget_bytes
        self._secret = secret
        self._state_dir = state_dir
        self._prefix_cache_enabled = prefix_cache_enabled
        self._min_partial_tokens = min_partial_tokens
        self._on_broken = on_broken
        self._place = WriterPlace(clock)
        self._pool: Pool | None = None
        self._on_replaced: list[Callable[[], None]] = []
        self._on_books: list[Callable[[BlockManager], None]] = []
        self._on_created: list[Callable[[Pool], None]] = []
        self._on_dropped: list[Callable[[Pool], None]] = []
        self._on_writer_attached: list[Callable[[WriterAttached], None]] = []

    def when_replaced(self, callback: Callable[[], None]) -> None:
        """Call `callback` before a pool gives way to another one or is dropped, while its books are there."""
        self._on_replaced.append(callback)

    def when_books_begin(self, callback: Callable[[BlockManager], None]) -> None:
        """Call `callback` with the books of a pool before anything happens in them.

        After a restart those are the books as the last snapshot shows them, before the changes since then are applied.
        """
        self._on_books.append(callback)

    def begin_books(self, manager: BlockManager) -> None:
        """Something is about to happen in the books of a pool."""
        for callback in self._on_books:
            callback(manager)

    def when_created(self, callback: Callable[[Pool], None]) -> None:
        """Call `callback` with a new pool before anybody is told of it."""
        self._on_created.append(callback)

    def when_dropped(self, callback: Callable[[Pool], None]) -> None:
        """Call `callback` with a pool that is over, after those of `when_replaced`."""
        self._on_dropped.append(callback)

    def when_writer_attached(self, callback: Callable[[WriterAttached], None]) -> None:
        """Call `callback` when a writer is about to get the bytes, before it does."""
        self._on_writer_attached.append(callback)

    @property
    def pool(self) -> Pool:
        """The pool; raises NoPool."""
        if self._pool is None:
            raise NoPool("no compute service has attached a pool yet", retry_after_s=1.0)
        return self._pool

    @property
    def whole_pool(self) -> Pool:
        """The pool, when its bytes are there; raises NoPool."""
        if self.pool.is_missing_bytes:
            message = "the pool's bytes are missing until the compute service hands them back"
            raise NoPool(message, retry_after_s=1.0)
        return self.pool

    @property
    def writer(self) -> Writer | None:
        """The writer that was let in last."""
        return self._place.writer

    def new_manager(
        self,
        pool_id: str,
        num_blocks: int,
        block_size: int,
        *,
        prefix_cache_enabled: bool | None = None,
    ) -> BlockManager:
        """Books of a pool, in which nothing stands yet; `prefix_cache_enabled` None: as the settings say."""
        is_enabled = (
            self._prefix_cache_enabled if prefix_cache_enabled is None else prefix_cache_enabled
        )
        manager = BlockManager(
            num_blocks,
            block_size,
            BlockHasher(self._secret, pool_id.encode()),
            prefix_cache_enabled=is_enabled,
            min_partial_tokens=self._min_partial_tokens,
        )
        if self._on_broken is not None:
            manager.on_broken = self._on_broken
        return manager

    # After a restart

    def restore(
        self,
        pool_id: str,
        identity: PoolIdentity,
        manager: BlockManager,
        *,
        in_writers_memory: bool,
        writer: WriterAttached | None,
    ) -> None:
        """Put the pool of before a restart in place. `writer` held it last; None: nobody ever did."""
        size_bytes = identity.size_bytes(manager.pool.num_blocks)
        pool = Pool(pool_id, identity, manager, size_bytes, in_writers_memory)
        pool.find_bytes(self._state_dir)
        self._pool = pool
        if writer is not None:
            self._place.restore(writer)

    def drop_lost_pool(self) -> None:
        """Give a pool up whose bytes nobody will bring back: the next writer gets a new one."""
        pool = self._pool
        if pool is None or not pool.is_missing_bytes or self._place.is_awaited():
            return
        _logger.warning(
            "pool_lost", pool_id=pool.pool_id, reason="its bytes went with the compute service"
        )
        self._place.give_up()
        self._drop()

    def resume(self, identity: PoolIdentity, pool_id: str, writer_generation: int) -> Attachment:
        """Let the writer of before a restart go on, with the generation that it has.

        Raises:
            PoolMismatch: when its pool is not there any more, or another writer was let in since.
            WriterAlive: when it is connected already.
        """
        self.drop_lost_pool()
        pool = self._pool
        if pool is None or (pool.pool_id, pool.identity) != (pool_id, identity):
            found = pool.pool_id if pool else "none"
            message = f"pool {pool_id!r} is not there any more; there is {found}"
            raise PoolMismatch(message, metadata={"pool_id": pool_id, "expected_pool_id": found})
        writer = self._place.resume(writer_generation)
        return Attachment(pool, writer_generation, writer.ticket, is_warm=True)

    # Attach

    def attach(
        self, identity: PoolIdentity, max_model_len: int, *, in_writers_memory: bool = False
    ) -> Attachment:
        """Let a writer in.

        `in_writers_memory`: the writer reserves the bytes itself. Whatever such a pool held went with its last writer.

        Raises:
            InvalidRequest: when the identity makes no sense.
            WriterAlive: while another writer lives.
            BudgetTooSmall: when the budget cannot hold one longest sequence.
            StartupError: when the machine does not have the memory.
        """
        check_identity(identity, max_model_len)
        self.drop_lost_pool()
        self._place.check_free()
        num_blocks = num_blocks_within(self._budget_bytes, identity, max_model_len)
        pool = self._pool
        is_warm = not in_writers_memory and self._fits(pool, identity, num_blocks)
        if pool is None or not is_warm:
            pool = self._replace(identity, num_blocks, in_writers_memory=in_writers_memory)
        writer = self._place.let_in()
        return Attachment(pool, writer.generation, writer.ticket, is_warm)

    def _fits(self, pool: Pool | None, identity: PoolIdentity, num_blocks: int) -> bool:
        """Whether `pool` is what a new one would be, bytes included; after a restart settings may be others."""
        return (
            pool is not None
            and pool.fd is not None
            and pool.identity == identity
            and pool.manager.pool.num_blocks == num_blocks
            and pool.manager.prefix_cache_enabled == self._prefix_cache_enabled
        )

    def _replace(self, identity: PoolIdentity, num_blocks: int, *, in_writers_memory: bool) -> Pool:
        self._drop()
        pool_id = secrets.token_hex(8)
        size_bytes = identity.size_bytes(num_blocks)
        pool = Pool(
            pool_id,
            identity,
            self.new_manager(pool_id, num_blocks, identity.block_size),
            size_bytes,
            in_writers_memory,
            None if in_writers_memory else create_pool_file(size_bytes, self._state_dir, pool_id),
        )
        self.begin_books(pool.manager)
        for callback in self._on_created:
            callback(pool)
        self._pool = pool
        return pool

    def _drop(self) -> None:
        pool = self._pool
        if pool is None:
            return
        for end in self._on_replaced:
            end()
        self.close()
        for callback in self._on_dropped:
            callback(pool)

    # Descriptor

    def redeem(
        self, ticket: str, process: WriterProcess, held: int | None = None
    ) -> tuple[Pool, Writer]:
        """Make the holder of `ticket` the writer, once; `held` is a descriptor that came with it, and stays the caller's.

        Raises:
            TicketRefused: when the ticket is unknown, used or late, or `held` is not what a writer that resumes holds.
        """
        writer, pool = self._place.redeem(ticket), self.pool
        if writer.is_resuming:
            try:
                pool.take_back(held)
            except WrongPoolBytesError as error:
                raise TicketRefused(f"the descriptor is not the pool's: {error}") from error
        if self._place.connect(writer, process):
            attached = WriterAttached(writer.generation, process.pid, process.started_ticks)
            for callback in self._on_writer_attached:
                callback(attached)
        return pool, writer

    def writer_gone(self, generation: int) -> None:
        """The socket of a writer ended."""
        self._place.gone(generation)

    def close(self) -> None:
        """Let the bytes go; those in the state folder stay there."""
        if self._pool is not None:
            self._pool.close()
        self._pool = None
