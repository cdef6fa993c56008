"""The process of a writer, so that a restarted memory service can tell whether it still lives."""

from __future__ import annotations

import os
import select
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from quire.descriptor import peer_pid

if TYPE_CHECKING:
    import socket

_STARTED_FIELD: Final = 19  # `starttime`, counted behind the name of the program


@dataclass(frozen=True, slots=True)
class WriterProcess:
    """A process, recognised even when its id was given to another one."""

    pid: int  # 0: it is in a PID namespace that this process does not see
    started_ticks: int  # since boot


UNKNOWN_PROCESS: Final = WriterProcess(0, 0)


def process_at(connection: socket.socket) -> WriterProcess:
    """The process at the other end of a Unix socket; UNKNOWN_PROCESS when it cannot be seen from here."""
    pid = peer_pid(connection)
    started = _started_ticks(pid) if pid else None
    return UNKNOWN_PROCESS if started is None else WriterProcess(pid, started)


def is_running(process: WriterProcess) -> bool | None:
    """Whether any thread of `process` still runs; None when that cannot be told from here."""
    if not process.pid:
        return None
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    except OSError:  # no kernel that has them
        return _started_ticks(process.pid) == process.started_ticks
    try:
        # Opened before the look at its start, it names the process that was looked at.
        if _started_ticks(process.pid) != process.started_ticks:
            return False
        return not _is_readable(pidfd)
    finally:
        os.close(pidfd)


def _is_readable(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _started_ticks(pid: int) -> int | None:
    with suppress(OSError):
        line = Path(f"/proc/{pid}/stat").read_text()
        # The name stands in parentheses and may hold anything, spaces and parentheses too.
        return int(line.rpartition(")")[2].split()[_STARTED_FIELD])
    return None
