"""Single keys from the terminal."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from typing import Any, Self


class Keys:
    """Reads keys as they are pressed for as long as the `with` block lasts; from what is no terminal none ever come.

    The terminal is left as it was found.
    """

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._as_found: Any = None  # as termios has it

    def wait(self, seconds: float) -> str:
        """The next key, "" when none was pressed in so many seconds."""
        if self._fd is None:
            time.sleep(seconds)
            return ""
        ready, _, _ = select.select([self._fd], [], [], seconds)
        return os.read(self._fd, 1).decode(errors="replace") if ready else ""

    def __enter__(self) -> Self:
        if self._fd is not None:
            self._as_found = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._as_found)
