"""What the benchmark and an engine's driver say to each other: JSON lines over the driver's standard streams.

A driver runs in the environment of its engine, so this module needs nothing but the standard library. It loads the
checkpoint, warms up and says `{"about": {...}}`; from then on each line `{"requests": [...]}` is one run of a workload,
answered by `{"token_times": [[...], ...]}`. It ends when its standard input does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Of one request: when each output token was there, in seconds since the run began.
TokenTimes = list[float]


@dataclass(frozen=True, slots=True)
class Request:
    """What every engine is asked, greedily and past any end token."""

    arrival_s: float  # since the run began
    prompt: list[int]  # token ids
    num_output: int  # tokens


class Engine(Protocol):
    """What a driver wraps."""

    def about(self) -> dict[str, str]:
        """`version`, and `precision`: what weights, products and keys and values are in."""

    def run(self, requests: list[Request]) -> list[TokenTimes]:
        """Answer all requests, none before its arrival; one list for each, in their order."""


class Arrivals:
    """The clock of a run, and the requests that have yet to arrive."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._left = deque(sorted(enumerate(requests), key=lambda found: found[1].arrival_s))
        self._started = time.perf_counter()

    def __bool__(self) -> bool:
        """Whether any has yet to arrive."""
        return bool(self._left)

    def now(self) -> float:
        """Seconds since the run began."""
        return self.since_start(time.perf_counter())

    def since_start(self, at: float) -> float:
        """The same of a reading of `time.perf_counter`."""
        return at - self._started

    def due(self) -> Iterator[tuple[int, Request]]:
        """Those that have arrived since the last call, each with its place in the list of requests."""
        while self._left and self._left[0][1].arrival_s <= self.now():
            yield self._left.popleft()

    def sleep(self) -> None:
        """Until the next one arrives."""
        if self._left:
            time.sleep(max(0.0, self._left[0][1].arrival_s - self.now()))


def warm_up_requests() -> list[Request]:
    """Two short ones, to be answered before a driver says that it is ready."""
    return [Request(0.0, list(range(10 + which, 42 + which)), 4) for which in range(2)]


def serve(engine: Engine) -> None:
    """Answer runs until standard input ends; called with an engine that is warm."""
    # Libraries print to standard output as they like: the answers get it for themselves.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        _say(answers, {"about": engine.about()})
        for line in sys.stdin:
            requests = [Request(**found) for found in json.loads(line)["requests"]]
            _say(answers, {"token_times": engine.run(requests)})


def as_line(requests: Sequence[Request]) -> str:
    """A run, as a driver reads it."""
    return json.dumps({"requests": [asdict(request) for request in requests]}) + "\n"


def _say(answers: Any, message: dict[str, Any]) -> None:  # noqa: ANN401 -- a text stream
    answers.write(json.dumps(message) + "\n")
    answers.flush()
