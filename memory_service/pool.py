"""A pool: what it is, its books and its bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from memory_service.pool_bytes import reopen_pool_file
from quire.pool_trailer import WrongPoolBytesError, verify_pool_descriptor

if TYPE_CHECKING:
    from pathlib import Path

    from memory_service.block_manager import BlockManager
    from memory_service.pool_identity import PoolIdentity

_logger = structlog.get_logger()


@dataclass(slots=True)
class Pool:
    """A pool whose books are there.

    After a restart its bytes may be missing until the writer of before brings them: nobody may hit what the books say
    is cached, but everybody may look at them.
    """

    pool_id: str
    identity: PoolIdentity
    manager: BlockManager
    size_bytes: int
    in_writers_memory: bool  # the bytes lie with the writer, and end with it
    fd: int | None = None  # None: they lie with the writer, or are missing
    is_missing_bytes: bool = False

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.identity.block_bytes

    def find_bytes(self, state_dir: Path | None) -> None:
        """Open the file that an earlier service left in `state_dir`; otherwise the writer has to bring the bytes."""
        logger = _logger.bind(pool_id=self.pool_id, size_bytes=self.size_bytes)
        try:
            if self.in_writers_memory or state_dir is None:
                raise WrongPoolBytesError("they lie with the compute service")
            self.fd = reopen_pool_file(self.size_bytes, state_dir, self.pool_id)
        except WrongPoolBytesError as reason:
            self.is_missing_bytes = True
            logger.info("bytes_awaited", reason=str(reason))
        else:
            logger.info("bytes_found")

    def take_back(self, held: int | None) -> None:
        """Verify what a writer that resumes holds, and keep a descriptor of it when we have none.

        Raises:
            WrongPoolBytesError: when it is not this pool's bytes.
        """
        if not self.in_writers_memory:
            self._take_descriptor(held)
        self.is_missing_bytes = False

    def _take_descriptor(self, held: int | None) -> None:
        if held is None:
            raise WrongPoolBytesError("there is none, and a writer that resumes has one")
        verify_pool_descriptor(held, self.size_bytes, self.pool_id)
        if self.fd is None:
            self.fd = os.dup(held)
        elif not os.path.sameopenfile(held, self.fd):
            raise WrongPoolBytesError("it is of another file than the pool's")

    def close(self) -> None:
        """Let the bytes go; those in a state folder stay there."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


@dataclass(frozen=True, slots=True)
class Attachment:
    """What a writer is told."""

    pool: Pool
    writer_generation: int
    ticket: str
    is_warm: bool
