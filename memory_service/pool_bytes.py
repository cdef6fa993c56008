"""The pool's bytes: an open file whose pages are all there.

On tmpfs it has a name in the state folder and outlives both services. On any other file system the kernel would write
gigabytes of it back to a disk: there it is anonymous, lives as long as somebody holds a descriptor of it, and after a
restart of the memory service the compute service hands it back.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from quire.pool_trailer import (
    TRAILER_BYTES,
    WrongPoolBytesError,
    verify_pool_descriptor,
    write_trailer,
)
from quire.serving import StartupError

POOL_FILE: Final = "pool.kv"
_MOUNTS: Final = Path("/proc/self/mountinfo")


def create_pool_file(size_bytes: int, state_dir: Path | None, pool_id: str) -> int:
    """A file descriptor of `size_bytes` reserved bytes and a trailer that names `pool_id`, close-on-exec.

    With a `state_dir` on tmpfs a file there, in place of the one of an earlier pool, else an anonymous one that ends
    with its last descriptor. Reserving now charges the pages to this process and turns too little memory into an error
    here instead of a SIGBUS in the writer.

    Raises:
        StartupError: when the machine does not have so much memory.
    """
    path = _path(state_dir)
    fd = _open(path)
    try:
        os.ftruncate(fd, size_bytes + TRAILER_BYTES)
        os.posix_fallocate(fd, 0, size_bytes + TRAILER_BYTES)
        write_trailer(fd, size_bytes, pool_id)
    except OSError as error:
        os.close(fd)
        if path is not None:
            path.unlink()
        message = f"cannot reserve {size_bytes} bytes for the KV pool: {error.strerror}"
        raise StartupError(message) from error
    return fd


def reopen_pool_file(size_bytes: int, state_dir: Path, pool_id: str) -> int:
    """A descriptor of the file that an earlier memory service left in `state_dir`, close-on-exec.

    Raises:
        WrongPoolBytesError: when there is none, or it holds another pool or only a part of this one.
    """
    try:
        fd = os.open(state_dir / POOL_FILE, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise WrongPoolBytesError(f"{state_dir / POOL_FILE}: {error.strerror}") from error
    try:
        verify_pool_descriptor(fd, size_bytes, pool_id)
    except WrongPoolBytesError as error:
        os.close(fd)
        raise WrongPoolBytesError(f"{state_dir / POOL_FILE}: {error}") from error
    return fd


def is_on_tmpfs(folder: Path) -> bool:
    """Whether files in `folder` are memory and nothing else."""
    status = folder.stat()
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    mounts = (line.split() for line in _MOUNTS.read_text().splitlines())
    # id, parent, device, root, mount point, options, any number of optional fields, "-", type, ...
    return any(
        fields[2] == device and fields[fields.index("-") + 1] == "tmpfs" for fields in mounts
    )


def _path(state_dir: Path | None) -> Path | None:
    if state_dir is None:
        return None
    state_dir.mkdir(parents=True, exist_ok=True)
    return state_dir / POOL_FILE if is_on_tmpfs(state_dir) else None


def _open(path: Path | None) -> int:
    if path is None:
        return os.memfd_create("quire-kv-pool", os.MFD_CLOEXEC)
    # Cutting an old file would kill whoever still maps it; without its name it goes with the last of them.
    path.unlink(missing_ok=True)
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
