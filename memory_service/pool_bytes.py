"""The pool's bytes: an open file whose pages are all there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from quire.serving import StartupError

if TYPE_CHECKING:
    from pathlib import Path

POOL_FILE = "pool.kv"


def create_pool_file(size_bytes: int, state_dir: Path | None) -> int:
    """A file descriptor of `size_bytes` reserved bytes, close-on-exec.

    With `state_dir` a file there, else an anonymous one that ends with its last descriptor. Reserving now charges the
    pages to this process and turns too little memory into an error here instead of a SIGBUS in the writer.

    Raises:
        StartupError: when the machine does not have so much memory.
    """
    fd = _open(state_dir)
    try:
        os.ftruncate(fd, size_bytes)
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        os.close(fd)
        message = f"cannot reserve {size_bytes} bytes for the KV pool: {error.strerror}"
        raise StartupError(message) from error
    return fd


def _open(state_dir: Path | None) -> int:
    if state_dir is None:
        return os.memfd_create("quire-kv-pool", os.MFD_CLOEXEC)
    state_dir.mkdir(parents=True, exist_ok=True)
    return os.open(state_dir / POOL_FILE, os.O_CREAT | os.O_RDWR | os.O_TRUNC | os.O_CLOEXEC, 0o600)
