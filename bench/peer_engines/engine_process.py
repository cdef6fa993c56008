"""One engine's driver as a child process."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

from bench.peer_engines.wire import Request, TokenTimes, as_line

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 300.0  # kernels may have to be compiled
STOP_TIMEOUT_S = 30.0


class EngineFailed(RuntimeError):
    """A driver ended by itself; what it said is in its log."""


class EngineProcess:
    """Loads when it is entered, and is idle between runs, so that engines can take turns.

    A driver runs in a session of its own: one that must be killed is killed with all its children.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command = list(command)
        self._log = log
        self.about: dict[str, str] = {}
        # The most that its processes held in one life of the driver, each at its own time. Pages that two of them map
        # count twice.
        self.peak_gib = 0.0

    def __enter__(self) -> Self:
        self._log.unlink(missing_ok=True)
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill()

    def ensure_running(self) -> None:
        """Load it again if it ended."""
        if self._process.poll() is not None:
            self._start()

    def run(self, requests: list[Request], limit_s: float) -> list[TokenTimes]:
        """One run of a workload; after an error it is no longer running.

        Raises:
            TimeoutError: it took longer than `limit_s`.
            EngineFailed: the driver ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(as_line(requests))
            self._process.stdin.flush()
            times: list[TokenTimes] = self._answer(limit_s)["token_times"]
        except (TimeoutError, OSError, EngineFailed):
            self._note_peak()
            self._kill()
            raise
        self._note_peak()
        return times

    def cpu_s(self) -> float:
        """Processor seconds that its processes used so far."""
        found = [process.cpu_times() for process in self._processes()]
        return sum(times.user + times.system for times in found)

    def _start(self) -> None:
        with self._log.open("a") as log:
            self._process = subprocess.Popen(  # noqa: S603 -- our own drivers
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )
        try:
            self.about = self._answer(START_TIMEOUT_S)["about"]
        except BaseException:
            self._kill()
            raise

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _note_peak(self) -> None:
        held = sum(peak_kib(process.pid) for process in self._processes()) / 2**20
        self.peak_gib = max(self.peak_gib, held)

    def _processes(self) -> list[psutil.Process]:
        if self._process.poll() is not None:
            return []
        driver = psutil.Process(self._process.pid)
        return [driver, *driver.children(recursive=True)]

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        """The driver's next line, which comes in one piece."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            raise TimeoutError(f"no answer in {timeout_s:.0f} s from {' '.join(self._command)}")
        line = self._process.stdout.readline()
        if not line:
            raise EngineFailed(f"its driver has ended; {self._log} says why")
        answer: dict[str, Any] = json.loads(line)
        return answer


def peak_kib(pid: int) -> int:
    """The high-water mark of what a process held; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) if found else 0
