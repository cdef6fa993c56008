"""Pools of a few kilobytes, without a model."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_service.pool_identity import PoolIdentity
from memory_service.pool_registry import PoolRegistry
from memory_service.record import WriterAttached
from quire.pool_layout import LayerGeometry

if TYPE_CHECKING:
    from collections.abc import Iterator

IDENTITY = PoolIdentity((LayerGeometry(2, 4, 4),), "float32", 16, (0, 1), "fingerprint")
BUDGET_BYTES = 1 << 16
SECRET = bytes(range(32))
MAX_MODEL_LEN = 64


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def num_open_descriptors() -> int:
    """Descriptors that this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def folder_on_tmpfs() -> Iterator[Path]:
    """A new folder whose files are memory."""
    found = Path(tempfile.mkdtemp(prefix="quire-test-", dir="/dev/shm"))
    try:
        yield found
    finally:
        shutil.rmtree(found)


def new_registry(state_dir: Path | None = None, **changes: Any) -> PoolRegistry:
    """A registry as a memory service makes it at its start."""
    fields = {"secret": SECRET, "state_dir": state_dir, "clock": Clock(), **changes}
    return PoolRegistry(fields.pop("budget_bytes", BUDGET_BYTES), **fields)


def restarted(
    before: PoolRegistry,
    writer: WriterAttached | None,
    state_dir: Path | None = None,
    **changes: Any,
) -> PoolRegistry:
    """The registry of the memory service after `before`, its books recovered."""
    found, pool = new_registry(state_dir, **changes), before.pool
    found.restore(
        pool.pool_id,
        pool.identity,
        found.new_manager(pool.pool_id, pool.manager.pool.num_blocks, pool.identity.block_size),
        in_writers_memory=pool.in_writers_memory,
        writer=writer,
    )
    return found


def started_ticks(pid: int) -> int:
    """When the process began, in clock ticks since boot."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def are_same_file(one: int | None, other: int | None) -> bool:
    """Whether both descriptors are there, and of one file."""
    return one is not None and other is not None and os.path.sameopenfile(one, other)


def own_process() -> WriterAttached:
    """This process as the first writer."""
    return WriterAttached(1, os.getpid(), started_ticks(os.getpid()))
