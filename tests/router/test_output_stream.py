"""What a client is told when: the first output and the end at once, what lies between at intervals."""

from __future__ import annotations

import asyncio
from array import array

import pytest

from quire.errors import StepFailed
from router.output_stream import DeltaEvent, OutputStream
from router.request import Finish, FinishReason
from router.text_output import OutputDelta, TextOutput

NEVER_S = 3600.0
END = Finish(0, FinishReason.LENGTH, 1, 1, 0)


class Sample:
    """One sample of a request, and its client."""

    def __init__(self, interval_s: float) -> None:
        self.stream = OutputStream(1, interval_s)
        self._token_ids = array("i")
        self._output = TextOutput(self._token_ids, None, (), include_stop_string=False)

    def sample(self, *token_ids: int) -> None:
        for token_id in token_ids:
            self._token_ids.append(token_id)
            self.stream.output(0, self._output)

    async def hear(self) -> list[DeltaEvent | Finish]:
        async with asyncio.timeout(10):
            return await self.stream.events()

    async def hears_nothing(self) -> bool:
        """Nothing in the turns of the loop in which a task would have been woken."""
        listening = asyncio.create_task(self.stream.events())
        for _ in range(5):
            await asyncio.sleep(0)
        return listening.cancel()


def delta(*token_ids: int) -> DeltaEvent:
    return 0, OutputDelta(token_ids, "", ())


def test_without_an_interval_tokens_go_as_they_come() -> None:
    """Each is an event of its own when its client is quick, and together they are one when it is not."""

    async def run() -> None:
        client = Sample(interval_s=0)
        for token_id in (1, 2):
            client.sample(token_id)
            assert await client.hear() == [delta(token_id)]
        client.sample(3, 4, 5)
        assert await client.hear() == [delta(3, 4, 5)]

    asyncio.run(run())


def test_the_first_output_goes_at_once_and_the_next_waits() -> None:
    """Nobody is told before the interval is over."""

    async def run() -> None:
        client = Sample(NEVER_S)
        client.sample(1)
        assert await client.hear() == [delta(1)]
        client.sample(2, 3)
        assert await client.hears_nothing()

    asyncio.run(run())


def test_what_waits_goes_when_the_interval_is_over() -> None:
    """Also when no token comes any more to remind of it: its sequence may have been preempted."""

    async def run() -> None:
        client = Sample(0.02)
        for token_id in (1, 3, 5):
            client.sample(token_id, token_id + 1)
            assert await client.hear() == [delta(token_id, token_id + 1)]

    asyncio.run(run())


def test_an_end_goes_at_once_with_all_that_waits() -> None:
    """The last tokens and the finish do not wait for the interval; behind them there is nothing."""

    async def run() -> None:
        client = Sample(NEVER_S)
        client.sample(1)
        await client.hear()
        client.sample(2, 3)
        client.stream.finished(END)
        assert await client.hear() == [delta(2, 3), END]
        assert await client.hear() == []

    asyncio.run(run())


def test_an_error_goes_at_once() -> None:
    """It ends the call, whatever waits."""

    async def run() -> None:
        client = Sample(NEVER_S)
        client.sample(1)
        await client.hear()
        client.sample(2)
        client.stream.failed(StepFailed("poison"))
        with pytest.raises(StepFailed, match="poison"):
            await client.hear()

    asyncio.run(run())


def test_streams_that_begin_together_are_not_all_due_together() -> None:
    """Else all their messages would be made in one turn, and hold up the step that is due then."""

    async def run() -> None:
        clients = [Sample(NEVER_S) for _ in range(64)]
        for client in clients:
            client.sample(1)
            await client.hear()
        due = {round(client.stream._due_at) for client in clients}
        assert 1 < len(due) <= 4

    asyncio.run(run())
