"""Files of framed payloads: appended with one write, read back with every byte under a checksum.

    frame = length u32, checksum of the length u32, checksum of the payload u32, payload; all little-endian, CRC-32

The length has a checksum of its own: with a wrong one, the rest of the file would pass for a torn tail and be lost
without a word.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final, Self
from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

FRAME: Final = struct.Struct("<III")
_LENGTH: Final = struct.Struct("<I")
TEMPORARY_SUFFIX: Final = ".tmp"
_MODE: Final = 0o600
_CREATE: Final = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC


class StateError(Exception):
    """The state folder cannot be used. The message is one line and is all that the user sees."""


class LogCorrupt(StateError):
    """A file holds bytes that nobody wrote there; the message names the file and the byte offset."""

    def __init__(self, path: Path, offset: int, why: str) -> None:
        super().__init__(f"{path} is corrupt at byte {offset}: {why}")
        self.path = path
        self.offset = offset


class LogUnwritable(StateError):
    """A change could not be written; nothing may be told that depends on it."""


def pack_frame(payload: bytes) -> bytes:
    """The bytes of a frame."""
    length = len(payload)
    return FRAME.pack(length, crc32(_LENGTH.pack(length)), crc32(payload)) + payload


class FrameReader:
    """The frames of one file as (offset, payload), in order.

    A frame that ends behind the end of the file was being written when its writer died: iteration ends before it, and
    `num_torn_bytes` counts what was left out. Any other disagreement raises LogCorrupt.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end = 0  # behind the last whole frame that was read
        self._data = _read(path)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Read on from `end`."""
        while (payload := self._payload_at(self.end)) is not None:
            offset = self.end
            self.end += FRAME.size + len(payload)
            yield offset, payload

    @property
    def num_torn_bytes(self) -> int:
        """Bytes behind the last whole frame, once iteration has ended."""
        return len(self._data) - self.end

    def _payload_at(self, offset: int) -> bytes | None:
        begin = offset + FRAME.size
        if begin > len(self._data):
            return None
        length, header_checksum, payload_checksum = FRAME.unpack_from(self._data, offset)
        if crc32(self._data[offset : offset + _LENGTH.size]) != header_checksum:
            raise LogCorrupt(self.path, offset, "the checksum of a frame's length is wrong")
        payload = self._data[begin : begin + length]
        if len(payload) < length:
            return None
        if crc32(payload) != payload_checksum:
            raise LogCorrupt(self.path, offset, "the checksum of a frame's payload is wrong")
        return payload


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}"
        raise StateError(message) from error


class FrameWriter:
    """Appends frames to a file, open until `close`. After a failed write nothing more is ever written."""

    def __init__(self, path: Path, fd: int, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self._fd = fd

    @classmethod
    def create(cls, path: Path, first: bytes) -> Self:
        """A new file that begins with the payload `first`; nobody ever sees it without; raises LogUnwritable."""
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        try:
            temporary.unlink(missing_ok=True)
            writer = cls(path, os.open(temporary, _CREATE, _MODE), 0)
            writer.append([first])
            temporary.rename(path)
        except OSError as error:
            raise _unwritable(path, error) from error
        return writer

    @classmethod
    def resume(cls, path: Path, end: int) -> Self:
        """Go on behind byte `end` of an existing file, whatever stood there is cut; raises LogUnwritable."""
        try:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            os.ftruncate(fd, end)
        except OSError as error:
            raise _unwritable(path, error) from error
        return cls(path, fd, end)

    def append(self, payloads: Iterable[bytes]) -> None:
        """Write all `payloads` with one call of the system; raises LogUnwritable.

        There is no fsync: the pool's own bytes do not survive the machine either.
        """
        frames = b"".join(map(pack_frame, payloads))
        try:
            written = os.write(self._fd, frames)
            while written < len(frames):
                written += os.write(self._fd, frames[written:])
        except OSError as error:
            self.close()
            raise _unwritable(self.path, error) from error
        self.size_bytes += len(frames)

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _unwritable(path: Path, error: OSError) -> LogUnwritable:
    return LogUnwritable(f"cannot write {path}: {error.strerror}")
