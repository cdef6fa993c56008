"""Clients of a router in a process of their own: streams of tokens, counted for a while.

    python -m bench.router_clients ADDRESS NUM_STREAMS SECONDS

Prints "begin" when every stream has had its first tokens, "end" after SECONDS, then one line of JSON, a `ClientView`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import grpc
import numpy as np

from protos.router.v1 import router_pb2 as pb
from protos.router.v1 import router_pb2_grpc
from quire.client.channel import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

PROMPT_TOKENS, MAX_TOKENS = 16, 16_000
_SETTLE_S = 1.0


@dataclass(frozen=True, slots=True)
class ClientView:
    """What clients saw in a window of time."""

    seconds: float
    num_tokens: int
    num_messages: int
    ttft_ms: tuple[float, float]  # median and 99th percentile
    gap_ms: tuple[float, float]  # between messages of a stream; the same
    itl_ms: float  # of the mean stream: the window by its tokens


@dataclass(slots=True)
class Stream:
    """The arrivals of one stream."""

    started_at: float
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)


async def _read(stub: router_pb2_grpc.RouterServiceAsyncStub, stream: Stream, seed: int) -> None:
    request = pb.GenerateRequest(
        tokens=pb.TokenIds(ids=np.random.default_rng(seed).integers(300, 4000, PROMPT_TOKENS)),
        stopping=pb.StoppingCriteria(max_tokens=MAX_TOKENS, ignore_eos=True),
    )
    call = stub.Generate(request)
    while isinstance(event := await call.read(), pb.GenerateResponse):
        if num_tokens := len(event.delta.token_ids):
            stream.times.append(time.perf_counter())
            stream.counts.append(num_tokens)
            stream.has_begun.set()


async def watch(address: str, num_streams: int, seconds: float) -> ClientView:
    """Read `num_streams` streams over one connection, and look at `seconds` of them."""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        streams = [Stream(time.perf_counter()) for _ in range(num_streams)]
        tasks = [
            asyncio.create_task(_read(stub, stream, seed)) for seed, stream in enumerate(streams)
        ]
        await asyncio.gather(*(stream.has_begun.wait() for stream in streams))
        await asyncio.sleep(_SETTLE_S)
        print("begin", flush=True)
        begin = time.perf_counter()
        await asyncio.sleep(seconds)
        end = time.perf_counter()
        print("end", flush=True)
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return _view(streams, begin, end)


def _view(streams: Sequence[Stream], begin: float, end: float) -> ClientView:
    times = np.concatenate([stream.times for stream in streams])
    counts = np.concatenate([stream.counts for stream in streams])
    inside = (times >= begin) & (times < end)
    gaps = np.concatenate([np.diff([at for at in s.times if begin <= at < end]) for s in streams])
    first = np.array([stream.times[0] - stream.started_at for stream in streams])
    num_tokens = int(counts[inside].sum())
    return ClientView(
        seconds=end - begin,
        num_tokens=num_tokens,
        num_messages=int(inside.sum()),
        ttft_ms=_spread(first),
        gap_ms=_spread(gaps),
        itl_ms=(end - begin) * len(streams) / num_tokens * 1e3,
    )


def _spread(seconds: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> tuple[float, float]:
    return float(np.median(seconds) * 1e3), float(np.percentile(seconds, 99) * 1e3)


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(watch(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))))))
