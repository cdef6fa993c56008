"""The hot path: steps are planned, sent and taken in, one or two of them in flight."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
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

    def submit(self, batch: StepBatch) -> asyncio.Future[StepResult | StepFailure]:
        """Send a step as it is now; steps run in the order of these calls."""


@dataclass(slots=True)
class _InFlight:
    """A step that compute was sent and that was not taken in yet."""

    batch: StepBatch
    outcome: asyncio.Future[StepResult | StepFailure]
    laps: _Laps
    planning: float  # seconds
    memory: float  # seconds
    compute: float = 0.0  # seconds

    def times(self) -> StepTimes:
        """What the step took; its publishing is what has passed since the last lap."""
        return StepTimes(self.planning, self.memory, self.compute, self.laps.seconds())


class StepLoop:
    """Drives a scheduler against the two services; connects again when one of them went away.

    Args:
        scheduler: who runs what.
        memory: is asked about a step while the one before runs.
        compute: runs steps.
        tally: counts them.
        check_terms: raises when the services came back as others than before.
        steps_in_flight: steps that compute may have been sent and not answered; with two it never waits for us.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        memory: Memory,
        compute: Compute,
        tally: Tally,
        check_terms: Callable[[ServedModel, SessionTerms], None] = lambda _model, _terms: None,
        steps_in_flight: int = 2,
    ) -> None:
        self._scheduler = scheduler
        self._tally = tally
        self._memory = memory
        self._compute = compute
        self._check_terms = check_terms
        self._steps_in_flight = steps_in_flight
        self._in_flight: deque[_InFlight] = deque()
        self._unpublished: tuple[_InFlight, StepResult] | None = None  # acknowledged, not told
        self._wake = asyncio.Event()  # requests came or went, or a step ended
        self.is_connected = asyncio.Event()
        self.is_connected.set()  # whoever builds the loop has just connected

    def wake(self) -> None:
        """Requests were added or aborted."""
        self._wake.set()

    async def run(self) -> None:
        """Run steps until cancelled."""
        try:
            while True:
                self._wake.clear()
                if not self._scheduler.has_work:
                    await self._wake.wait()
                try:
                    await self._run_steps()
                except StreamLost as lost:
                    self._publish()
                    await self._abandon()
                    await self._reconnect(lost)
        finally:
            await self._abandon()

    async def _run_steps(self) -> None:
        while self._scheduler.has_work or self._in_flight:
            self._wake.clear()
            if self._may_begin and await self._begin():
                continue
            self._publish()
            await self._until_news()
            if self._in_flight and self._in_flight[0].outcome.done():
                self._end(self._in_flight.popleft())

    @property
    def _may_begin(self) -> bool:
        if not self._in_flight:
            return self._scheduler.has_work
        has_room = len(self._in_flight) < self._steps_in_flight and self._scheduler.may_overlap
        return has_room and self._scheduler.has_work_to_plan

    async def _begin(self) -> bool:
        """Put a step in flight; whether there was anything to run."""
        laps = _Laps()
        plan = self._scheduler.plan()
        if plan.is_empty:
            return False
        planning = laps.seconds()
        answer = await self._ask_memory(plan)
        memory = laps.seconds()
        batch = self._admit(plan, answer)
        if batch is None:
            self._scheduler.skip(plan)
            return False
        outcome = self._compute.submit(batch)
        outcome.add_done_callback(lambda _: self._wake.set())
        planning += laps.seconds()
        self._in_flight.append(_InFlight(batch, outcome, laps, planning, memory))
        return True

    async def _ask_memory(self, plan: StepPlan) -> MemoryAnswer:
        """Ask, and publish the step before while memory works."""
        asking = asyncio.ensure_future(self._memory.allocate(plan))
        try:
            await asyncio.sleep(0)  # lets the question out
            self._publish()
            return await asking
        finally:
            asking.cancel()

    async def _until_news(self) -> None:
        """Wait until the oldest step has ended, or something changed that lets another one begin."""
        if self._in_flight:
            if not self._in_flight[0].outcome.done():
                await self._wake.wait()
        elif not self._scheduler.owes_memory:
            with suppress(TimeoutError):
                async with asyncio.timeout(_REFUSED_WAIT_S):
                    await self._wake.wait()

    def _end(self, step: _InFlight) -> None:
        """A step has ended: note its progress, so that the next one can be planned; its tokens are told beside that."""
        outcome = step.outcome.result()
        step.compute = step.laps.seconds()
        if isinstance(outcome, StepFailure):
            self._fail(step.batch, outcome)
            self._tally.step_ended(step.times(), outcome)
        else:
            self._scheduler.acknowledge(step.batch)
            self._unpublished = step, outcome

    def _publish(self) -> None:
        """Tokens to text to the clients' streams."""
        if self._unpublished is None:
            return
        (step, result), self._unpublished = self._unpublished, None
        step.laps.seconds()
        self._scheduler.take_outputs(step.batch, result)
        self._tally.step_ended(step.times(), result)

    async def _abandon(self) -> None:
        """Nobody will answer the steps in flight, or nobody is left to hear."""
        lost = [step.outcome for step in self._in_flight]
        self._in_flight.clear()
        for outcome in lost:
            outcome.cancel()
        await asyncio.gather(*lost, return_exceptions=True)

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

    def _fail(self, batch: StepBatch, outcome: StepFailure) -> None:
        sequence_ids = [sequence.sequence_id for sequence in batch.work.sequences]
        if outcome.message:  # else an earlier one failed, and this one was only discarded
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
