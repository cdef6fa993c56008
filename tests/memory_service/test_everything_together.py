"""Pool, sessions and log together, under any sequence of calls, kills and broken streams, against the naive model."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
from hypothesis import settings
from hypothesis.stateful import invariant, rule
from pool_machine import NUM_BLOCKS, NUM_ROWS, SIZE, PoolMachine
from pools import Clock, started_ticks
from state_folders import open_store

from memory_service.demand import StepAnswer, StepDemand
from memory_service.fold import Fold
from memory_service.integrity import check_integrity
from memory_service.pool_identity import PoolIdentity
from memory_service.pool_keeper import PoolKeeper
from memory_service.pool_registry import PoolRegistry
from memory_service.sessions import Sessions
from memory_service.snapshot import export_state
from memory_service.writer_process import WriterProcess
from quire.errors import SessionFenced
from quire.pool_layout import LayerGeometry

if TYPE_CHECKING:
    from memory_service.log_file import LogUnwritable
    from memory_service.session import Session
    from memory_service.state_store import StateStore

# A block's keys fill a page, so that a budget of so many pages is a pool of so many blocks.
_DIMENSION = 4096 // (4 * SIZE)
_IDENTITY = PoolIdentity((LayerGeometry(1, _DIMENSION, _DIMENSION),), "float32", SIZE, (0, 1), "m")
_BUDGET_BYTES = NUM_BLOCKS * 2 * 4096
_LEASE_S = 10.0


def _must_not_happen(error: LogUnwritable) -> NoReturn:
    raise AssertionError from error


class ServiceMachine(PoolMachine):
    """The machine of the pool, with everything of the service around it but gRPC."""

    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="quire-test-", dir="/dev/shm"))
        self.lease_clock = Clock()
        self._start()
        attachment = self.registry.attach(_IDENTITY, SIZE)
        self.manager = attachment.pool.manager
        assert self.manager.pool.num_blocks == NUM_BLOCKS
        self.shadow = self.registry.new_manager(attachment.pool.pool_id, NUM_BLOCKS, SIZE)
        self.manager.observers.append(Fold(self.shadow).apply)
        # The test itself is the writer, and lives on: no restart finds it dead.
        process = WriterProcess(os.getpid(), started_ticks(os.getpid()))
        self.registry.redeem(attachment.ticket, process)
        self._open()

    def _start(self) -> None:
        self.store: StateStore = open_store(self.folder)
        self.registry = PoolRegistry(
            _BUDGET_BYTES, secret=self.store.secret, state_dir=self.folder, min_partial_tokens=2
        )
        self.registry.when_writer_attached(
            lambda found: self.registry.pool.manager.attach_writer(
                found.generation, found.pid, found.started_ticks
            )
        )
        self.sessions = Sessions(
            self.registry, clock=self.lease_clock, lease_ttl_s=_LEASE_S, max_num_rows=NUM_ROWS
        )
        self.keeper = PoolKeeper(self.registry, self.store, _must_not_happen)

    def _open(self) -> None:
        pool, writer = self.registry.pool, self.registry.writer
        assert writer is not None
        self.session: Session = self.sessions.open("s", pool.pool_id, writer.generation, NUM_ROWS)
        self.generation = self.session.generation
        self.session_key = self.session.key

    def apply(self, demand: StepDemand) -> StepAnswer:
        return self.sessions.apply(self.session, self.generation, demand)

    @rule()
    def the_stream_breaks(self) -> None:
        """The router resumes on a new one; whoever still holds the old one is fenced."""
        self.sessions.detach(self.session, self.generation)
        old = self.generation
        self._open()
        with pytest.raises(SessionFenced):
            self.sessions.apply(self.session, old, StepDemand(step=self.step + 1))

    @rule()
    def the_lease_lapses(self) -> None:
        """All that the session held returns; what was sealed may still be hit."""
        self.sessions.detach(self.session, self.generation)
        self.lease_clock.now += _LEASE_S / 2
        assert self.sessions.end_lapsed() == []
        self.lease_clock.now += _LEASE_S / 2
        assert self.sessions.end_lapsed() == ["s"]
        assert self.manager.pool.num_available == NUM_BLOCKS - 1
        self.sequences.clear()
        self.queue.clear()
        self._open()

    @rule()
    def restart(self) -> None:
        """The service is killed: another one finds the log, the bytes and the session."""
        self.store.close()
        self.registry.close()
        self._start()
        self.keeper.restore(self.sessions)
        self.manager = self.registry.pool.manager
        self.manager.observers.append(Fold(self.shadow).apply)
        assert export_state(self.shadow) == export_state(self.manager)
        assert not self.registry.pool.is_missing_bytes
        self._open()

    @invariant()
    def the_session_is_known(self) -> None:
        assert self.manager.ledger.sessions[self.session_key].generation == self.generation

    def teardown(self) -> None:
        self.sessions.end(self.session, self.generation)
        assert check_integrity(self.manager) == []
        assert self.manager.pool.num_available == NUM_BLOCKS - 1
        self.store.close()
        self.registry.close()
        shutil.rmtree(self.folder)


ServiceMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("QUIRE_TEST_EXAMPLES", "25")),
    stateful_step_count=40,
    deadline=None,
)
test_a_service_keeps_what_it_told = ServiceMachine.TestCase
