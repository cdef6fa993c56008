"""The hot path: one step after another."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import structlog

from quire.errors import BrokenContract, QuireError
from router.ordered_stream import StreamLost
from router.request_log import ids_of_sequence
from router.step import StepFailure
from router.tally import StepTimes

if TYPE_CHECKING:
    from collections.abc import Callable

    from router.clients import ServedModel, SessionTerms
    from router.scheduler import Scheduler
    from router.step import MemoryAnswer, StepBatch, StepPlan, StepResult
    from router.tally import Tally

# Waiting sequences that memory refuses are offered again at least this often: other sessions free blocks unseen.
_REFUSED_WAIT_S = 0.01
_RECONNECT_WAIT_S = 0.2

_logger = structlog.get_logger()


class Memory(Protocol):
    """The session with the memory service."""

    session_id: str

    async def open_session(self, model: ServedModel) -> SessionTerms:
        """Open or resume the session."""

    async def allocate(self, plan: StepPlan) -> MemoryAnswer:
        """Ask for what a step needs."""


class Compute(Protocol):
    """The stream of steps to the compute service."""

    async def get_model(self) -> ServedModel:
        """What is served."""

    async def open_steps(self, session_id: str, generation: int, pool_id: str) -> None:
        """Open a stream for the steps of a session generation."""

    async def execute(self, batch: StepBatch) -> StepResult | StepFailure:
        """Run a step."""


class StepLoop:
    """Drives a scheduler against the two services; connects again when one of them went away."""

    def __init__(
        self,
        scheduler: Scheduler,
        memory: Memory,
        compute: Compute,
        tally: Tally,
        check_terms: Callable[[ServedModel, SessionTerms], None] = lambda _model, _terms: None,
    ) -> None:
        self._scheduler = scheduler
        self._tally = tally
        self._memory = memory
        self._compute = compute
        self._check_terms = check_terms
        self._wake = asyncio.Event()
        self.is_connected = asyncio.Event()
        self.is_connected.set()  # whoever builds the loop has just connected

    def wake(self) -> None:
        """Requests were added or aborted."""
        self._wake.set()

    async def run(self) -> None:
        """Run steps until cancelled."""
        while True:
            self._wake.clear()
            if not self._scheduler.has_work:
                await self._wake.wait()
            try:
                await self._run_steps()
            except StreamLost as lost:
                await self._reconnect(lost)

    async def _run_steps(self) -> None:
        while self._scheduler.has_work:
            self._wake.clear()
            ran = await self.step()
            if not ran and not self._scheduler.owes_memory:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_REFUSED_WAIT_S):
                        await self._wake.wait()

    async def step(self) -> bool:
        """One step; whether it ran anything."""
        lap = _Laps()
        plan = self._scheduler.plan()
        planning = lap.seconds()
        answer = await self._memory.allocate(plan)
        memory = lap.seconds()
        batch = self._admit(plan, answer)
        if batch is None:
            self._scheduler.skip(plan)
            return False
        planning += lap.seconds()
        outcome = await self._compute.execute(batch)
        compute = lap.seconds()
        self._take(batch, outcome)
        self._tally.step_ended(StepTimes(planning, memory, compute, lap.seconds()), outcome)
        return True

    def _admit(self, plan: StepPlan, answer: MemoryAnswer) -> StepBatch | None:
        batch = self._scheduler.admit(plan, answer)
        for victim in self._scheduler.victims:
            _logger.info(
                "preempted",
                **ids_of_sequence(victim),
                step=plan.step,
                num_available_blocks=answer.num_available_blocks,
            )
        return batch

    def _take(self, batch: StepBatch, outcome: StepResult | StepFailure) -> None:
        if not isinstance(outcome, StepFailure):
            self._scheduler.apply(batch, outcome)
            return
        sequence_ids = [work.sequence.sequence_id for work in batch.work]
        _logger.warning(
            "step_failed", step=outcome.step, reason=outcome.message, sequence_ids=sequence_ids
        )
        guilty = self._scheduler.fail(batch, outcome)
        if guilty is not None:
            _logger.warning(
                "makes_steps_fail",
                **ids_of_sequence(guilty),
                step=outcome.step,
            )

    async def _reconnect(self, lost: StreamLost) -> None:
        """Open both streams again; requests wait meanwhile and go on from what memory still has."""
        self.is_connected.clear()
        logger = _logger.bind(session_id=self._memory.session_id)
        logger.warning("stream_lost", reason=str(lost))
        if isinstance(lost.cause, BrokenContract):
            logger.error("broken_contract", reason=lost.cause.message, **lost.cause.metadata)
        while not self.is_connected.is_set():
            try:
                await self._connect()
            except (StreamLost, QuireError) as error:
                _logger.debug("reconnect_failed", reason=str(error))
                await asyncio.sleep(_RECONNECT_WAIT_S)

    async def _connect(self) -> None:
        model = await self._compute.get_model()
        terms = await self._memory.open_session(model)
        self._check_terms(model, terms)
        await self._compute.open_steps(self._memory.session_id, terms.generation, model.pool_id)
        self._scheduler.session_resumed(terms.held_rows)
        self._tally.reconnected()
        self.is_connected.set()
        _logger.info(
            "reconnected",
            session_id=self._memory.session_id,
            generation=terms.generation,
            held_rows=len(terms.held_rows),
        )


class _Laps:
    """A stopwatch: seconds since it was last asked, or made."""

    __slots__ = ("_at",)

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the last call."""
        before, self._at = self._at, time.perf_counter()
        return self._at - before
