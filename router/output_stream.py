"""From the step loop to one client: output waits here, and runs together when it comes faster than it is sent."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.errors import QuireError
    from router.request import Finish
    from router.text_output import OutputDelta, TextOutput

_NUM_PARTS = 4  # of an interval, with as many groups of streams

DeltaEvent = tuple[int, "OutputDelta"]  # sample index, output


class OutputStream:
    """The sink of one request. The step loop never waits for it.

    What a sample puts out stays in its `TextOutput` until a client's call takes it: a client that reads slowly gets few
    large deltas, and all that is kept for it is its own output.

    Args:
        num_samples: samples that will end.
        interval_s: the first output is told at once, later output about so many seconds after what was taken before;
            ends and errors are always told at once.
    """

    def __init__(self, num_samples: int, interval_s: float = 0.0) -> None:
        self._outputs: dict[int, TextOutput] = {}  # by sample, those that grew
        self._finishes: list[Finish] = []
        self._num_left = num_samples
        self._error: QuireError | None = None
        self._changed = asyncio.Event()
        self._interval_s = interval_s
        self._due_at = 0.0  # on the loop's clock: when output may be told; 0: at once

    def output(self, sample_index: int, output: TextOutput) -> None:
        """The output of one sample has grown."""
        if not self._outputs:
            self._tell_when_due()
        self._outputs[sample_index] = output

    def finished(self, finish: Finish) -> None:
        """The end of one sample."""
        self._finishes.append(finish)
        self._changed.set()

    def failed(self, error: QuireError) -> None:
        """The end of the request by an error."""
        self._error = error
        self._changed.set()

    async def events(self) -> list[DeltaEvent | Finish]:
        """Wait for deltas and ends; none once every sample has ended. Raises the error that ended the request."""
        while self._num_left:
            await self._changed.wait()
            self._changed.clear()
            if self._error is not None:
                raise self._error
            if events := self._take():
                return events
        return []

    def _tell_when_due(self) -> None:
        if self._due_at and (loop := asyncio.get_running_loop()).time() < self._due_at:
            loop.call_at(self._due_at, self._changed.set)
        else:
            self._changed.set()

    def _take(self) -> list[DeltaEvent | Finish]:
        events: list[DeltaEvent | Finish] = [
            (sample_index, delta)
            for sample_index, output in self._outputs.items()
            if (delta := output.take()) is not None
        ]
        if events and self._interval_s:
            self._due_at = self._next_due(asyncio.get_running_loop().time())
        events += self._finishes
        self._num_left -= len(self._finishes)
        self._outputs, self._finishes = {}, []
        return events

    def _next_due(self, now: float) -> float:
        """A multiple of a part of the interval: streams that are due together wake the process once, not one by one."""
        part = self._interval_s / _NUM_PARTS
        # Streams that began in one step would all be due together for ever, and hold up that step.
        num_parts = _NUM_PARTS if self._due_at else random.randint(1, _NUM_PARTS)  # noqa: S311 -- no secret
        return (round(now / part) + num_parts) * part
