"""Child processes: started in order, started again when they die, ended in reverse order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MAX_RESTARTS = 5
_RESTART_WINDOW_S = 60.0

_logger = structlog.get_logger()


@dataclass(slots=True)
class _Child:
    """A service and the process that runs it now."""

    module: str
    arguments: tuple[str, ...]
    may_restart: bool  # false for a process whose end the others cannot survive
    process: subprocess.Popen[bytes]
    restarts: deque[float] = field(default_factory=lambda: deque(maxlen=_MAX_RESTARTS))


class Supervisor:
    """Runs our services as children.

    A child ends with its parent even when that is killed: it watches `--parent-pid`.

    Args:
        environment: variables of the children.
        grace_s: seconds that a child gets to end before it is killed.
    """

    def __init__(self, environment: Mapping[str, str], grace_s: float) -> None:
        self._environment = dict(environment)
        self._grace_s = grace_s
        self._children: list[_Child] = []

    def start(self, module: str, arguments: Sequence[str], *, may_restart: bool) -> None:
        """Start the service whose package is `module`; its logs go to our stderr."""
        process = self._spawn(module, arguments)
        self._children.append(_Child(module, tuple(arguments), may_restart, process))

    def _spawn(self, module: str, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        own = ["--parent-pid", str(os.getpid())]
        command = [sys.executable, "-m", module, *arguments, *own]
        # Ctrl-C reaches only this process, which ends the children in order.
        return subprocess.Popen(command, start_new_session=True, env=self._environment)  # noqa: S603 -- our own modules

    def ended(self) -> str | None:
        """Why a child ended by itself, in words; None while all run."""
        for child in self._children:
            status = child.process.poll()
            if status is not None:
                return f"{child.module} {_in_words(status)}"
        return None

    def restart_ended(self) -> str | None:
        """Start again what ended; why that cannot be done, in words, or None."""
        for child in self._children:
            status = child.process.poll()
            if status is None:
                continue
            why = f"{child.module} {_in_words(status)}"
            if not child.may_restart:
                return why
            if _restarts_too_often(child):
                return f"{why}, for the {_MAX_RESTARTS + 1}th time within {_RESTART_WINDOW_S:.0f} s"
            _logger.error("restarting", reason=why)
            child.restarts.append(time.monotonic())
            child.process = self._spawn(child.module, child.arguments)
        return None

    def stop(self) -> None:
        """End the children, last started first; whoever does not end in time is killed."""
        for child in reversed(self._children):
            child.process.send_signal(signal.SIGTERM)
            try:
                child.process.wait(self._grace_s)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


def _restarts_too_often(child: _Child) -> bool:
    return (
        len(child.restarts) == _MAX_RESTARTS
        and time.monotonic() - child.restarts[0] < _RESTART_WINDOW_S
    )


def _in_words(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
