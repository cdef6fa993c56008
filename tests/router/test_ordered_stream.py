"""The stream on which answers come in order, over a call that a test plays."""

from __future__ import annotations

import asyncio
import gc

import grpc
import pytest

from router.ordered_stream import OrderedStream, StreamLost


class PlayedCall:
    """The other side of a call: answers are put in, requests are kept."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.answers: asyncio.Queue[object] = asyncio.Queue()

    async def write(self, request: str) -> None:
        self.requests.append(request)

    async def read(self) -> object:
        return await self.answers.get()

    async def done_writing(self) -> None:
        self.answers.put_nowait(grpc.aio.EOF)

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.OK


def test_answers_go_to_those_who_asked_in_order() -> None:
    """Two questions in flight get the first and the second answer."""

    async def run() -> tuple[str, str]:
        call = PlayedCall()
        stream: OrderedStream[str, str] = OrderedStream("it", lambda: call)
        asked = asyncio.gather(stream.ask("a"), stream.ask("b"))
        await asyncio.sleep(0.01)
        call.answers.put_nowait("A")
        call.answers.put_nowait("B")
        first, second = await asked
        await stream.close()
        return first, second

    assert asyncio.run(run()) == ("A", "B")


def test_an_answer_to_nobody_disturbs_nobody() -> None:
    """When who asked was cancelled, as at shutdown, the answer is dropped and the stream still ends well."""

    async def run() -> list[str]:
        call = PlayedCall()
        stream: OrderedStream[str, str] = OrderedStream("it", lambda: call)
        asked = asyncio.create_task(stream.ask("a"))
        await asyncio.sleep(0.01)
        asked.cancel()
        call.answers.put_nowait("A")
        await stream.close("goodbye")
        return call.requests

    assert asyncio.run(run()) == ["a", "goodbye"]


class StuckCall(PlayedCall):
    """A call whose window is full."""

    async def write(self, request: str) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("call_class", [PlayedCall, StuckCall])
@pytest.mark.parametrize("is_lost_first", [True, False])
def test_who_was_cancelled_leaves_no_error_behind(
    call_class: type[PlayedCall], *, is_lost_first: bool
) -> None:
    """A stream that is lost at shutdown tells nobody of it who has gone, and nothing is logged."""
    found: list[object] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context))
        call = call_class()
        stream: OrderedStream[str, str] = OrderedStream("it", lambda: call)
        asked = asyncio.create_task(stream.ask("a"))
        await asyncio.sleep(0.01)
        if is_lost_first:
            call.answers.put_nowait(grpc.aio.EOF)
            await asyncio.wait([stream._reader])
        asked.cancel()
        await asyncio.sleep(0.01)
        call.answers.put_nowait(grpc.aio.EOF)
        await asyncio.wait([stream._reader, asked])
        if asked.done() and not asked.cancelled():
            asked.exception()
        del asked, stream
        gc.collect()

    asyncio.run(run())
    gc.collect()
    assert found == []


def test_the_end_of_the_stream_ends_every_question() -> None:
    """Who waits, and who asks later, is told that the stream is lost."""

    async def run() -> None:
        call = PlayedCall()
        stream: OrderedStream[str, str] = OrderedStream("it", lambda: call)
        asked = asyncio.create_task(stream.ask("a"))
        await asyncio.sleep(0.01)
        call.answers.put_nowait(grpc.aio.EOF)
        for question in (asked, stream.ask("b")):
            with pytest.raises(StreamLost, match="it: the stream ended"):
                await question

    asyncio.run(run())
