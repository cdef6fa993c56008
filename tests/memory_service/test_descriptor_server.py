"""The descriptor socket, with real sockets, descriptors and processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from pools import (
    IDENTITY,
    MAX_MODEL_LEN,
    are_same_file,
    folder_on_tmpfs,
    new_registry,
    num_open_descriptors,
    own_process,
    restarted,
)

from memory_service.descriptor_server import DescriptorServer
from memory_service.record import WriterAttached
from quire.descriptor import DescriptorRefusedError, PoolDescriptor, fetch_descriptor
from quire.errors import WriterAlive
from quire.pool_trailer import verify_pool_descriptor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from memory_service.pool_registry import PoolRegistry

FETCH_AND_SLEEP = """
import sys, time
from quire.descriptor import fetch_descriptor
found = fetch_descriptor(*sys.argv[1:])
print("fetched", flush=True)
time.sleep(60)
"""


@asynccontextmanager
async def serving(path: Path, registry: PoolRegistry) -> AsyncIterator[None]:
    server = DescriptorServer(path, registry)
    server.start()
    try:
        yield
    finally:
        await server.close()
        registry.close()


async def fetch(path: Path, ticket: str, held: int | None = None) -> PoolDescriptor:
    return await asyncio.to_thread(fetch_descriptor, str(path), ticket, held=held)


async def until_let_in(registry: PoolRegistry, seconds: float = 10) -> int:
    """Attach as soon as the place is free; the generation."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return registry.attach(IDENTITY, MAX_MODEL_LEN).writer_generation
        except WriterAlive:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)


def test_a_writer_outlives_two_memory_services(tmp_path: Path) -> None:
    """It fetches the bytes, hands them to the next service, and so to the one after that; all three mean the same."""

    async def run() -> None:
        first, path = new_registry(), tmp_path / "d"
        heard: list[WriterAttached] = []
        first.when_writer_attached(heard.append)
        async with serving(path, first):
            attached = first.attach(IDENTITY, MAX_MODEL_LEN)
            own = await fetch(path, attached.ticket)
            assert heard == [own_process()]
            assert own.fd is not None
            os.pwrite(own.fd, b"kept", 4096)
            after = restarted(first, own_process())
        pool_id = after.pool.pool_id
        for _ in range(2):
            assert own.lifeline.recv(1) == b""
            async with serving(path, after):
                ticket = after.resume(IDENTITY, pool_id, 1).ticket
                found = await fetch(path, ticket, own.fd)
                assert found.fd is not None
                assert are_same_file(found.fd, own.fd)
                assert os.pread(found.fd, 4, 4096) == b"kept"
                verify_pool_descriptor(found.fd, after.pool.size_bytes, pool_id)
                assert after.writer is not None
                assert after.writer.is_connected
                os.close(found.fd)
                own.lifeline.close()
                own.lifeline = found.lifeline
                after = restarted(after, own_process())
        after.close()
        own.close()

    asyncio.run(run())


def test_a_refusal_is_one_line_and_keeps_no_descriptor(tmp_path: Path) -> None:
    """A resumption without the pool's descriptor, or with another one, is refused in words; nothing stays open."""

    async def run() -> None:
        first, path = new_registry(), tmp_path / "d"
        first.attach(IDENTITY, MAX_MODEL_LEN)
        after = restarted(first, own_process())
        async with serving(path, after):
            wrong = os.memfd_create("wrong")
            num_open = num_open_descriptors()
            for held, why in ((None, "there is none"), (wrong, "it has 0 bytes")):
                ticket = after.resume(IDENTITY, first.pool.pool_id, 1).ticket
                with pytest.raises(DescriptorRefusedError, match=why):
                    await fetch(path, ticket, held)
            deadline = time.monotonic() + 5
            while num_open_descriptors() != num_open:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            os.close(wrong)
        first.close()

    asyncio.run(run())


def test_a_resumed_writer_is_watched_until_its_death(tmp_path: Path) -> None:
    """Stopped it keeps others out; killed it makes room, and its successor finds the bytes in the state folder."""

    async def run(folder: Path) -> None:
        first, path = new_registry(folder), tmp_path / "d"
        first.attach(IDENTITY, MAX_MODEL_LEN)
        after = restarted(first, WriterAttached(1, 0, 0), folder)
        first.close()
        async with serving(path, after):
            attached = await until_let_in_after_grace(after)
            assert attached == 2
            ticket = after.writer.ticket if after.writer else ""
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", FETCH_AND_SLEEP, str(path), ticket, stdout=subprocess.PIPE
            )
            assert process.stdout is not None
            assert await process.stdout.readline() == b"fetched\n"
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(WriterAlive):
                after.attach(IDENTITY, MAX_MODEL_LEN)
            process.kill()
            assert await until_let_in(after) == 3
            await process.wait()

    async def until_let_in_after_grace(registry: PoolRegistry) -> int:
        registry._place._clock.now += 10  # type: ignore[attr-defined]
        return await until_let_in(registry)

    with folder_on_tmpfs() as folder:
        asyncio.run(run(folder))
