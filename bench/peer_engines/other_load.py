"""How much of the machine went to programs that are not being measured: beside them no number means much."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.peer_engines.engine_process import EngineProcess


class OtherLoad:
    """Adds up processor time that neither the engine whose turn it was nor idleness took."""

    def __init__(self) -> None:
        self._others_s = 0.0
        self._available_s = 0.0

    @contextmanager
    def beside(self, engine: EngineProcess) -> Iterator[None]:
        """Count what happens within; a run that fails counts nothing."""
        began, others_before = time.monotonic(), busy_s() - engine.cpu_s()
        yield
        self._others_s += max(0.0, busy_s() - engine.cpu_s() - others_before)
        self._available_s += (time.monotonic() - began) * (os.cpu_count() or 1)

    def share(self) -> float:
        """Of all processors."""
        return self._others_s / self._available_s if self._available_s else 0.0


def busy_s() -> float:
    """Processor seconds that the machine was not idle."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)
