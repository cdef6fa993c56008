"""Sessions over the pool: leases joined with the books of what each session holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from memory_service.session import Session, SessionRegistry
from quire.errors import InvalidRequest, PoolMismatch, TooManySequences

if TYPE_CHECKING:
    from collections.abc import Callable

    from memory_service.block_manager import BlockManager
    from memory_service.demand import StepAnswer, StepDemand
    from memory_service.pool_registry import PoolRegistry

MAX_SESSION_ID_CHARS = 128

_logger = structlog.get_logger()


class Sessions:
    """Opens, runs and ends sessions; what a session holds returns to the pool with its end."""

    def __init__(
        self,
        registry: PoolRegistry,
        *,
        clock: Callable[[], float],
        lease_ttl_s: float,
        max_num_rows: int,
    ) -> None:
        self._registry = registry
        self._leases = SessionRegistry(clock, lease_ttl_s)
        self._max_num_rows = max_num_rows
        registry.when_replaced(self.end_all)

    def __len__(self) -> int:
        """Live sessions."""
        return len(self._leases)

    @property
    def _manager(self) -> BlockManager:
        return self._registry.pool.manager

    def restore(self) -> None:
        """Take up the sessions that the pool of before a restart has."""
        ledger = self._manager.ledger
        self._leases.restore(
            [
                Session(
                    key,
                    books.session_id,
                    books.table.max_num_rows,
                    books.generation,
                    books.last_applied_step,
                )
                for key, books in ledger.sessions.items()
            ],
            ledger.last_session_key,
            ledger.last_generation,
        )

    def names(self) -> dict[int, str]:
        """Session ids by the key of their books."""
        return {found.key: found.session_id for found in self._leases}

    def open(
        self, session_id: str, pool_id: str, writer_generation: int, max_num_rows: int
    ) -> Session:
        """Open a session, or resume it.

        Raises:
            InvalidRequest: when a field is out of range.
            PoolMismatch: when the router's compute service writes elsewhere.
            TooManySequences: when so many rows are not to be had.
        """
        if not 1 <= len(session_id) <= MAX_SESSION_ID_CHARS or max_num_rows < 1:
            raise InvalidRequest("session_id needs 1 to 128 characters, max_num_rows at least 1")
        self._check_pool(pool_id, writer_generation)
        self._check_rows(session_id, max_num_rows)
        session, is_new = self._leases.open(session_id, max_num_rows)
        self._manager.open_session(session.key, max_num_rows, session_id, session.generation)
        _logger.info(
            "session_opened" if is_new else "session_resumed",
            session_id=session_id,
            generation=session.generation,
            max_num_rows=max_num_rows,
        )
        return session

    def _check_pool(self, pool_id: str, writer_generation: int) -> None:
        expected, writer = self._registry.whole_pool.pool_id, self._registry.writer
        generation = writer.generation if writer else 0
        if (pool_id, writer_generation) != (expected, generation):
            message = (
                f"this service serves pool {expected} of writer {generation}, "
                f"not {pool_id!r} of writer {writer_generation}"
            )
            raise PoolMismatch(message, metadata={"pool_id": pool_id, "expected_pool_id": expected})

    def _check_rows(self, session_id: str, max_num_rows: int) -> None:
        others = sum(found.max_num_rows for found in self._leases if found.session_id != session_id)
        if others + max_num_rows > self._max_num_rows:
            message = (
                f"{max_num_rows} rows beside {others} of other sessions are more than "
                f"--max-num-rows {self._max_num_rows}"
            )
            raise TooManySequences(message, metadata={"max_num_rows": self._max_num_rows})

    def apply(self, session: Session, generation: int, demand: StepDemand) -> StepAnswer:
        """Apply one step; raises SessionFenced or BrokenContract, with nothing applied."""
        self._leases.check_step(session, generation, demand.step)
        answer = self._manager.apply(session.key, demand)
        session.last_applied_step = demand.step
        return answer

    def detach(self, session: Session, generation: int) -> None:
        """A stream broke, or its session ended before."""
        if self._leases.is_current(session, generation):
            _logger.warning("stream_lost", session_id=session.session_id, generation=generation)
        self._leases.detach(session, generation)

    def end(self, session: Session, generation: int) -> None:
        """The router is done, unless a newer stream of the session says otherwise."""
        if self._leases.is_current(session, generation):
            self._close(session)

    def end_lapsed(self) -> list[str]:
        """End the sessions whose lease ran out; their ids."""
        lapsed = self._leases.lapsed()
        for session in lapsed:
            self._close(session)
        return [found.session_id for found in lapsed]

    def end_all(self) -> None:
        """End every session."""
        for session in self._leases:
            self._close(session)

    def _close(self, session: Session) -> None:
        self._leases.end(session)
        num_sequences = len(self._manager.table(session.key))
        self._manager.close_session(session.key)
        _logger.info(
            "session_ended", session_id=session.session_id, num_released_sequences=num_sequences
        )
