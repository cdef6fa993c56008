"""The pool, who may write to it, and the tickets for its descriptor."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memory_service.block_hash import BlockHasher
from memory_service.block_manager import BlockManager
from memory_service.pool_bytes import create_pool_file
from quire.errors import BudgetTooSmall, InvalidRequest, NoPool, WriterAlive
from quire.pool_layout import (
    ELEMENT_SIZES,
    LayerGeometry,
    block_bytes,
    longest_sequence,
    num_blocks_for,
    num_blocks_needed,
    pool_layout,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_TICKET_LIFE_S = 30.0
_SECRET_BYTES = 32
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class PoolIdentity:
    """Equal for writers that compute the same bytes for the same tokens."""

    layers: tuple[LayerGeometry, ...]
    dtype: str
    block_size: int
    tensor_parallel: tuple[int, int]  # rank, size
    model_fingerprint: str


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool that exists."""

    pool_id: str
    identity: PoolIdentity
    fd: int | None  # None: the bytes lie with the writer, and end with it
    size_bytes: int
    block_bytes: int
    manager: BlockManager


@dataclass(slots=True)
class Writer:
    """The compute service that was let in last."""

    generation: int
    ticket: str
    ticket_expires_at: float  # seconds of the monotonic clock
    is_connected: bool = False  # it fetched the descriptor and keeps the socket open


@dataclass(frozen=True, slots=True)
class Attachment:
    """What a writer is told."""

    pool: Pool
    writer_generation: int
    ticket: str
    is_warm: bool


class PoolRegistry:
    """One pool at a time. A writer of another identity gets another pool once the old writer is gone."""

    def __init__(
        self,
        budget_bytes: int,
        *,
        state_dir: Path | None = None,
        prefix_cache_enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget_bytes = budget_bytes
        self._state_dir = state_dir
        self._prefix_cache_enabled = prefix_cache_enabled
        self._clock = clock
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._pool: Pool | None = None
        self._writer: Writer | None = None
        self._on_replaced: Callable[[], None] = lambda: None

    def when_replaced(self, callback: Callable[[], None]) -> None:
        """Call `callback` before a pool gives way to one of another identity."""
        self._on_replaced = callback

    @property
    def pool(self) -> Pool:
        """The pool; raises NoPool."""
        if self._pool is None:
            raise NoPool("no compute service has attached a pool yet", retry_after_s=1.0)
        return self._pool

    @property
    def writer(self) -> Writer | None:
        """The writer that was let in last."""
        return self._writer

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
        _check_identity(identity, max_model_len)
        self._check_writer()
        pool = self._pool
        is_warm = (
            pool is not None
            and pool.identity == identity
            and pool.fd is not None
            and not in_writers_memory
        )
        if pool is None or not is_warm:
            pool = self._replace(identity, max_model_len, in_writers_memory=in_writers_memory)
        generation = self._writer.generation + 1 if self._writer else 1
        ticket = secrets.token_urlsafe(24)
        self._writer = Writer(generation, ticket, self._clock() + _TICKET_LIFE_S)
        return Attachment(pool, generation, ticket, is_warm)

    def _check_writer(self) -> None:
        writer = self._writer
        if writer is None:
            return
        may_still_fetch = bool(writer.ticket) and self._clock() < writer.ticket_expires_at
        if writer.is_connected or may_still_fetch:
            message = "another compute service writes to this pool; it is waited for until it ends"
            raise WriterAlive(message, metadata={"writer_generation": writer.generation})

    def _replace(
        self, identity: PoolIdentity, max_model_len: int, *, in_writers_memory: bool
    ) -> Pool:
        num_blocks = self._num_blocks(identity, max_model_len)
        if self._pool is not None:
            self._on_replaced()
            self.close()
        element_size = ELEMENT_SIZES[identity.dtype]
        size_bytes = pool_layout(
            identity.layers, element_size, identity.block_size, num_blocks
        ).size_bytes
        pool_id = secrets.token_hex(8)
        hasher = BlockHasher(self._secret, pool_id.encode())
        self._pool = Pool(
            pool_id,
            identity,
            None if in_writers_memory else create_pool_file(size_bytes, self._state_dir),
            size_bytes,
            block_bytes(identity.layers, element_size, identity.block_size),
            BlockManager(
                num_blocks,
                identity.block_size,
                hasher,
                prefix_cache_enabled=self._prefix_cache_enabled,
                clock=self._clock,
            ),
        )
        return self._pool

    def _num_blocks(self, identity: PoolIdentity, max_model_len: int) -> int:
        element_size = ELEMENT_SIZES[identity.dtype]
        geometry = (identity.layers, element_size, identity.block_size)
        num_blocks = num_blocks_for(self._budget_bytes, *geometry)
        num_needed = num_blocks_needed(max_model_len, identity.block_size)
        if num_blocks < num_needed:
            needed = pool_layout(*geometry, num_needed).size_bytes
            possible = longest_sequence(num_blocks, identity.block_size)
            message = (
                f"a memory budget of {self._budget_bytes / _MIB:.1f} MiB cannot hold one sequence of "
                f"{max_model_len} tokens: it takes {needed / _MIB:.1f} MiB (--memory-budget {needed}); "
                f"this budget holds --max-model-len {possible}"
            )
            raise BudgetTooSmall(
                message, metadata={"needed_bytes": needed, "budget_bytes": self._budget_bytes}
            )
        return num_blocks

    def redeem(self, ticket: str) -> Pool | None:
        """The pool for a ticket, once; None for one that is unknown, used or late."""
        writer, pool = self._writer, self._pool
        if writer is None or pool is None or not ticket:
            return None
        is_good = secrets.compare_digest(ticket, writer.ticket)
        if not is_good or self._clock() > writer.ticket_expires_at:
            return None
        writer.ticket = ""
        writer.is_connected = True
        return pool

    def writer_gone(self, generation: int) -> None:
        """The socket of a writer ended."""
        if self._writer is not None and self._writer.generation == generation:
            self._writer.is_connected = False

    def close(self) -> None:
        """Let the bytes go."""
        if self._pool is not None and self._pool.fd is not None:
            os.close(self._pool.fd)
        self._pool = None


def _check_identity(identity: PoolIdentity, max_model_len: int) -> None:
    size = identity.block_size
    if identity.dtype not in ELEMENT_SIZES:
        raise InvalidRequest(f"dtype {identity.dtype!r} is none of {', '.join(ELEMENT_SIZES)}")
    if not 1 <= size <= 256 or size & (size - 1):  # noqa: PLR2004 -- the range that the contract names
        raise InvalidRequest(f"block_size {size} is not a power of two from 1 to 256")
    sizes = [
        dimension
        for layer in identity.layers
        for dimension in (layer.num_kv_heads, layer.k_head_dim, layer.v_head_dim)
    ]
    if not sizes or min(sizes) < 1:
        raise InvalidRequest(
            "a pool needs at least one layer, with heads and dimensions above zero"
        )
    if max_model_len < 1:
        raise InvalidRequest(f"max_model_len {max_model_len} is below 1")
