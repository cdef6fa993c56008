"""A program on a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SHOW_CURSOR = "\x1b[?25h"
HIDE_CURSOR = "\x1b[?25l"
ENTER_SCREEN = "\x1b[?1049h"
LEAVE_SCREEN = "\x1b[?1049l"


@dataclass
class Terminal:
    """What a person sees of it, and types."""

    process: subprocess.Popen[bytes]
    ours: int
    theirs: int
    seen: str = ""
    _undecoded: bytes = field(default=b"", repr=False)

    def wait_for(self, text: str, seconds: float = 30) -> None:
        """Read until `text` was seen; what came before it is forgotten."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} was not seen in {self.seen[-2000:]!r}"
            self._read()
        self.seen = self.seen.partition(text)[2]

    def type(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def end(self) -> int:
        """Read the rest until the program ends; its exit status."""
        deadline = time.monotonic() + 30
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            self._read()
        self._read()
        return self.process.returncode

    @property
    def modes(self) -> list[Any]:
        """Whether lines are edited, keys echoed, and so on."""
        return termios.tcgetattr(self.theirs)

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def _read(self) -> None:
        if select.select([self.ours], [], [], 0.1)[0]:
            self.seen += os.read(self.ours, 1 << 16).decode(errors="replace")


@contextmanager
def on_a_terminal(command: Sequence[str], width: int = 80, height: int = 24) -> Iterator[Terminal]:
    """Run `command` on a new terminal, and end it with the block."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    environment = {
        key: value for key, value in os.environ.items() if key not in {"COLUMNS", "LINES"}
    }
    process = subprocess.Popen(
        # Ctrl-C then reaches the program as it does from a shell.
        ["setsid", "--ctty", *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment | {"TERM": "xterm-256color"},
    )
    try:
        yield Terminal(process, ours, theirs)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
