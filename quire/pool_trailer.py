"""The page behind the pool's bytes that says whose they are, so that no side takes one pool's bytes for another's.

    [0, size_bytes) keys and values | [size_bytes, size_bytes + 4096) magic, format version, pool id, size

A writer maps only `[0, size_bytes)`: no stray store reaches the trailer.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from typing import Final

TRAILER_BYTES: Final = 4096
_MAGIC: Final = b"QUIREKV\0"
_FORMAT_VERSION: Final = 1
_TRAILER: Final = struct.Struct("<8sIq64s")  # magic, format version, size of the pool, its id


class WrongPoolBytesError(Exception):
    """An open file is not what holds the bytes of the pool in question; the message says why, in one line."""


def write_trailer(fd: int, size_bytes: int, pool_id: str) -> None:
    """Say that `fd` holds the bytes of `pool_id`. Written last, it also says that all of them are there."""
    page = _TRAILER.pack(_MAGIC, _FORMAT_VERSION, size_bytes, pool_id.encode())
    os.pwrite(fd, page.ljust(TRAILER_BYTES, b"\0"), size_bytes)


def verify_pool_descriptor(fd: int, size_bytes: int, pool_id: str) -> None:
    """Return when `fd` is an open file, readable and writable, with the bytes of this very pool.

    Raises:
        WrongPoolBytesError: when it is anything else.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise WrongPoolBytesError("it is no regular file")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise WrongPoolBytesError("it is not open for reading and writing")
    if status.st_size != size_bytes + TRAILER_BYTES:
        raise WrongPoolBytesError(
            f"it has {status.st_size} bytes, not {size_bytes} and a trailer of {TRAILER_BYTES}"
        )
    _verify_trailer(os.pread(fd, _TRAILER.size, size_bytes), size_bytes, pool_id)


def _verify_trailer(page: bytes, size_bytes: int, pool_id: str) -> None:
    magic, version, size, name = _TRAILER.unpack(page)
    if magic != _MAGIC:
        raise WrongPoolBytesError("it has no trailer of a pool")
    if version != _FORMAT_VERSION:
        raise WrongPoolBytesError(
            f"its trailer has format version {version}, not {_FORMAT_VERSION}"
        )
    found = name.rstrip(b"\0").decode(errors="replace")
    if (found, size) != (pool_id, size_bytes):
        raise WrongPoolBytesError(
            f"it holds pool {found} of {size} bytes, not {pool_id} of {size_bytes}"
        )
