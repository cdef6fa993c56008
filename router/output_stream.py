"""From the step loop to one client: events wait here, and run together when the client is slower than the tokens."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from router.text_output import OutputDelta

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from quire.errors import QuireError
    from router.request import Finish

DeltaEvent = tuple[int, OutputDelta]  # sample index, output


class OutputStream:
    """The sink of one request. The step loop never waits for it."""

    def __init__(self, num_samples: int) -> None:
        self._deltas: dict[int, OutputDelta] = {}
        self._finishes: list[Finish] = []
        self._num_left = num_samples
        self._error: QuireError | None = None
        self._changed = asyncio.Event()

    def delta(self, sample_index: int, delta: OutputDelta) -> None:
        """New output of one sample."""
        earlier = self._deltas.get(sample_index)
        self._deltas[sample_index] = delta if earlier is None else _join(earlier, delta)
        self._changed.set()

    def finished(self, finish: Finish) -> None:
        """The end of one sample."""
        self._finishes.append(finish)
        self._changed.set()

    def failed(self, error: QuireError) -> None:
        """The end of the request by an error."""
        self._error = error
        self._changed.set()

    async def events(self) -> AsyncIterator[DeltaEvent | Finish]:
        """Deltas and ends, until every sample has ended; raises the error that ended the request."""
        while self._num_left:
            await self._changed.wait()
            self._changed.clear()
            if self._error is not None:
                raise self._error
            for event in self._take():
                yield event

    def _take(self) -> list[DeltaEvent | Finish]:
        events: list[DeltaEvent | Finish] = [*self._deltas.items(), *self._finishes]
        self._num_left -= len(self._finishes)
        self._deltas, self._finishes = {}, []
        return events


def _join(first: OutputDelta, second: OutputDelta) -> OutputDelta:
    return OutputDelta(
        first.token_ids + second.token_ids,
        first.text + second.text,
        first.logprobs + second.logprobs,
    )
