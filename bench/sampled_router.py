"""The router's process, looked at every few milliseconds of its processor time.

    python -m bench.sampled_router REPORT [flags of the router]

SIGUSR1 begins, SIGUSR2 ends and writes REPORT: JSON, samples by file and function. A sample belongs to the innermost
Python function: what that calls in C is its own, gRPC's threads and its Cython are `asyncio`'s.
"""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from router.__main__ import main

if TYPE_CHECKING:
    from types import CodeType, FrameType

INTERVAL_S = 0.001  # a kernel whose timer ticks less often rounds it up
_ROOT = Path(__file__).parents[1]


class Sampler:
    """Counts where the process is."""

    def __init__(self, report: Path) -> None:
        self._report = report
        self._counts: Counter[CodeType] = Counter()
        signal.signal(signal.SIGPROF, self._sample)
        signal.signal(signal.SIGUSR1, self._begin)
        signal.signal(signal.SIGUSR2, self._end)

    def _begin(self, _number: int, _frame: FrameType | None) -> None:
        self._counts.clear()
        signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)

    def _sample(self, _number: int, frame: FrameType | None) -> None:
        if frame is not None:
            self._counts[frame.f_code] += 1

    def _end(self, _number: int, _frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        found = [(_name(code), code.co_qualname, count) for code, count in self._counts.items()]
        self._report.write_text(json.dumps(found))


def _name(code: CodeType) -> str:
    path = Path(code.co_filename)
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else path.name


if __name__ == "__main__":
    Sampler(Path(sys.argv.pop(1)))
    sys.exit(main())
