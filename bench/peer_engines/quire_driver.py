"""Quire as its users meet it: `quire up`, and streams of a gRPC client in this process.

python -m bench.peer_engines.quire_driver FOLDER
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import quire
from bench.peer_engines.wire import Arrivals, Request, TokenTimes, serve, warm_up_requests
from quire.client import AsyncClient

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FLAGS = ("--listen", "127.0.0.1:0", "--memory-budget", "1GiB", "--log-level", "warning")


class QuireEngine:
    """A client of a router; each run has a connection of its own, made before its clock starts."""

    def __init__(self, address: str, weights: str) -> None:
        self._address = address
        self._weights = weights

    def about(self) -> dict[str, str]:
        """Keys and values are stored as the weights are."""
        precision = f"weights {self._weights}, KV {self._weights}"
        return {"version": f"Quire {quire.__version__}", "precision": precision}

    def run(self, requests: list[Request]) -> list[TokenTimes]:
        """All requests as streams, each begun when it arrives."""
        return asyncio.run(self._run(requests))

    async def _run(self, requests: list[Request]) -> list[TokenTimes]:
        async with AsyncClient(self._address) as client:
            await client.get_model()
            arrivals = Arrivals(requests)
            streams = (stream(client, request, arrivals) for request in requests)
            return await asyncio.gather(*streams)


async def stream(client: AsyncClient, request: Request, arrivals: Arrivals) -> TokenTimes:
    """Wait for the request's time, then note when each of its tokens comes in."""
    await asyncio.sleep(request.arrival_s)
    times: TokenTimes = []
    deltas = client.generate(
        request.prompt, temperature=0, max_tokens=request.num_output, ignore_eos=True
    )
    async for delta in deltas:
        times += [arrivals.now()] * len(delta.token_ids)
    return times


@contextmanager
def running_quire(folder: str) -> Iterator[str]:
    """`quire up` with the checkpoint; gives the router's address."""
    command = [str(Path(sys.executable).with_name("quire")), "up", "--model", folder, *FLAGS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 -- ourselves
    assert process.stdout is not None
    try:
        ready = process.stdout.readline().split()[1:]
        yield dict(part.split("=", 1) for part in ready)["router"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def weights_of(folder: str) -> str:
    """The dtype that the checkpoint's config names."""
    return str(json.loads((Path(folder) / "config.json").read_text())["dtype"])


def main(arguments: Sequence[str]) -> None:
    """Start it, warm it up, serve."""
    folder = arguments[0]
    with running_quire(folder) as address:
        engine = QuireEngine(address, weights_of(folder))
        engine.run(warm_up_requests())
        serve(engine)


if __name__ == "__main__":
    main(sys.argv[1:])
