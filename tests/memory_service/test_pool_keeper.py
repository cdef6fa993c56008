"""Registry, sessions and state folder together, over restarts without a process."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import pytest
from pools import IDENTITY, MAX_MODEL_LEN, Clock, folder_on_tmpfs, new_registry
from state_folders import open_store

from memory_service.demand import Admit, StepDemand
from memory_service.pool_keeper import PoolKeeper
from memory_service.sessions import Sessions
from memory_service.snapshot import export_state
from memory_service.state_folder import StateFolder
from memory_service.writer_process import UNKNOWN_PROCESS
from quire.errors import BrokenContract, NoPool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from memory_service.log_file import LogUnwritable
    from memory_service.pool_registry import PoolRegistry
    from memory_service.session import Session

TTL_S = 10.0


class Ended(Exception):
    """In place of the end of the process."""


def end(error: LogUnwritable) -> NoReturn:
    raise Ended from error


class Service:
    """What a memory service consists of beside its servers."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.clock = Clock()
        self.store = open_store(folder)
        fields = {"secret": self.store.secret, "clock": self.clock, **changes}
        self.registry: PoolRegistry = new_registry(folder, **fields)
        self.registry.when_writer_attached(
            lambda found: self.registry.pool.manager.attach_writer(
                found.generation, found.pid, found.started_ticks
            )
        )
        self.sessions = Sessions(
            self.registry, clock=self.clock, lease_ttl_s=TTL_S, max_num_rows=16
        )
        self.keeper = PoolKeeper(self.registry, self.store, end)
        self.keeper.restore(self.sessions)

    def attach(self) -> None:
        attachment = self.registry.attach(IDENTITY, MAX_MODEL_LEN)
        self.registry.redeem(attachment.ticket, UNKNOWN_PROCESS)

    def open(self, name: str = "router") -> Session:
        writer = self.registry.writer
        assert writer is not None
        return self.sessions.open(name, self.registry.pool.pool_id, writer.generation, 8)

    def close(self) -> None:
        self.registry.close()
        self.store.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_on_tmpfs() as found:
        yield found


def step(number: int, *prompts: list[int]) -> StepDemand:
    admits = tuple(
        Admit(row, 1, f"s{row}", "r", np.array(found, np.int32))
        for row, found in enumerate(prompts)
    )
    return StepDemand(step=number, admits=admits, admit_token_budget=100)


def test_pool_and_session_are_found_again(folder: Path) -> None:
    """A restarted service has the pool, its bytes, its writer and its sessions with their last step."""
    with closing(Service(folder)) as before:
        before.attach()
        session = before.open()
        before.sessions.apply(session, session.generation, step(7, [1, 2, 3]))
        expected, pool_id = export_state(before.registry.pool.manager), before.registry.pool.pool_id
    with closing(Service(folder)) as after:
        assert export_state(after.registry.pool.manager) == expected
        assert after.registry.whole_pool.pool_id == pool_id
        assert after.registry.writer is not None
        assert after.registry.writer.generation == 1
        resumed = after.open()
        assert (resumed.key, resumed.last_applied_step) == (session.key, 7)
        assert resumed.generation == session.generation + 1
        with pytest.raises(BrokenContract, match="does not rise"):
            after.sessions.apply(resumed, resumed.generation, step(7))


def test_session_nobody_resumes_lapses(folder: Path) -> None:
    """After a restart a lease runs from the start of the service; what the session held returns to the pool."""
    with closing(Service(folder)) as before:
        before.attach()
        session = before.open()
        before.sessions.apply(session, session.generation, step(1, [1, 2, 3]))
    with closing(Service(folder)) as after:
        after.clock.now += TTL_S - 1
        assert after.sessions.end_lapsed() == []
        after.clock.now += 1
        assert after.sessions.end_lapsed() == ["router"]
        assert after.registry.pool.manager.num_sequences == 0
    with closing(Service(folder)) as last:
        assert len(last.sessions) == 0


def test_new_sessions_get_new_keys_and_generations(folder: Path) -> None:
    """Neither a key nor a generation is given twice, though the session that had it ended before the restart."""
    with closing(Service(folder)) as before:
        before.attach()
        ended = before.open("first")
        before.sessions.end(ended, ended.generation)
    with closing(Service(folder)) as after:
        found = after.open("second")
        assert found.key > ended.key
        assert found.generation > ended.generation


def test_nothing_is_restored_into_a_new_folder(folder: Path) -> None:
    """There is no pool before a writer attached one."""
    with closing(Service(folder)) as service, pytest.raises(NoPool):
        _ = service.registry.pool


def test_books_keep_what_they_were_begun_with(folder: Path) -> None:
    """A pool that was begun with a prefix cache is folded with one, whatever the settings say now."""
    with closing(Service(folder)) as before:
        before.attach()
    with closing(Service(folder, prefix_cache_enabled=False)) as after:
        assert after.registry.pool.manager.prefix_cache_enabled


def test_another_pool_replaces_the_log(folder: Path) -> None:
    """When a pool gives way to another one its changes are removed, and its epoch ends."""
    with closing(Service(folder)) as before:
        before.attach()
        epoch = before.store.epoch
    with closing(Service(folder, prefix_cache_enabled=False)) as after:
        after.clock.now += (
            60  # the writer of before cannot be seen, and is not waited for any longer
        )
        attachment = after.registry.attach(IDENTITY, MAX_MODEL_LEN)
        assert not attachment.is_warm
        assert after.store.epoch not in {"", epoch}
        assert StateFolder(folder).logs() == [0]
    with closing(Service(folder)) as last:
        assert last.registry.pool.pool_id == attachment.pool.pool_id


def test_unwritable_log_ends_the_service(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that cannot be logged is not answered: the process ends."""
    with closing(Service(folder)) as service:
        service.attach()
        session = service.open()

        def full(_fd: int, _data: bytes) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(Ended):
            service.sessions.apply(session, session.generation, step(1, [1, 2]))
        monkeypatch.undo()
