"""Fetch the pool's file descriptor from the memory service: one ticket, one line, one descriptor.

Both sides speak this over a Unix stream socket: the caller sends its ticket and a newline; the answer is `OK` and a
newline with the descriptor attached (SCM_RIGHTS; none when the pool's bytes lie with the caller), or one line that says
why not. A caller that goes on after the memory service was restarted attaches the descriptor that it holds to its
ticket. It then keeps the socket open: its end tells the memory service that the writer may be gone.
"""

from __future__ import annotations

import os
import socket
import struct
from array import array
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

OK: Final = "OK"
MAX_LINE_BYTES: Final = 1024
_UCRED: Final = struct.Struct("3i")  # pid, uid, gid
_SO_PEERPIDFD: Final = 77  # Python 3.11 does not name it


class DescriptorRefusedError(Exception):
    """The memory service did not hand the descriptor out; the message says why."""


@dataclass(slots=True)
class PoolDescriptor:
    """The pool's bytes, as an open file, and the socket that says the writer lives.

    Both are the holder's to close. Closing `lifeline` gives up the right to write.
    """

    fd: (
        int | None
    )  # readable and writable, close-on-exec; map it shared. None: the bytes are the holder's own
    lifeline: socket.socket  # reads end of file when the memory service is gone

    def close(self) -> None:
        """Close the descriptor and stop being the writer. Mappings of the descriptor stay valid."""
        if self.fd is not None:
            os.close(self.fd)
        self.lifeline.close()


def fetch_descriptor(
    path: str, ticket: str, *, held: int | None = None, timeout_s: float = 10.0
) -> PoolDescriptor:
    """Trade `ticket` for the pool's descriptor at the descriptor socket `path`.

    `held`: a descriptor of the same bytes, which goes with the ticket of a writer that resumes. It stays open.

    Raises:
        DescriptorRefusedError: the socket is not there or is another user's, or the ticket is unknown, used or late.
    """
    lifeline = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        lifeline.settimeout(timeout_s)
        lifeline.connect(path)
        _check_owner(lifeline, path)
        socket.send_fds(lifeline, [ticket.encode() + b"\n"], [] if held is None else [held])
        fd = _receive(lifeline)
        lifeline.settimeout(None)
    except OSError as error:
        lifeline.close()
        message = f"descriptor socket {path}: {error.strerror or error}"
        raise DescriptorRefusedError(message) from error
    except DescriptorRefusedError:
        lifeline.close()
        raise
    return PoolDescriptor(fd, lifeline)


def peer_uid(connection: socket.socket) -> int:
    """User id of the process at the other end of a Unix socket, as the kernel saw it connect or listen."""
    return _peer_credentials(connection)[1]


def peer_pid(connection: socket.socket) -> int:
    """Id of that process; 0 when it is in a PID namespace that this one does not see."""
    return _peer_credentials(connection)[0]


def peer_pidfd(connection: socket.socket) -> int | None:
    """A descriptor that becomes readable when the process at the other end is dead; None where the kernel has none.

    SO_PEERPIDFD needs Linux 6.5 and works between PID namespaces that see nothing of each other; the process id of
    SO_PEERCRED is 0 there, and serves only within one namespace.
    """
    with suppress(OSError):
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    pid = peer_pid(connection)
    with suppress(OSError):
        return os.pidfd_open(pid) if pid else None
    return None


def _peer_credentials(connection: socket.socket) -> tuple[int, int, int]:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(raw)
    return pid, uid, gid


def _check_owner(lifeline: socket.socket, path: str) -> None:
    uid = peer_uid(lifeline)
    if uid != os.geteuid():
        message = f"descriptor socket {path} belongs to user {uid}, this process to {os.geteuid()}"
        raise DescriptorRefusedError(message)


def _receive(lifeline: socket.socket) -> int | None:
    descriptors = array("i")
    data, ancillary, _, _ = lifeline.recvmsg(
        MAX_LINE_BYTES, socket.CMSG_SPACE(descriptors.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(payload)
    line = data.decode(errors="replace").strip()
    if line != OK:
        raise DescriptorRefusedError(line or "the memory service closed the connection")
    return descriptors[0] if descriptors else None
