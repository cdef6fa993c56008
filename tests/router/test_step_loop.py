"""The loop of steps ends when it is told to, whatever it waits for at that moment."""

from __future__ import annotations

import asyncio

import pytest
from simulated_requests import make_request

from quire.errors import NotReady
from quire.serving import StartupError
from router.ordered_stream import StreamLost
from router.scheduler import Scheduler, SchedulerLimits
from router.step import MemoryAnswer, RefusalReason, StepBatch, StepFailure, StepPlan, StepResult
from router.step_loop import StepLoop
from router.tally import Tally


class RefusingMemory:
    """Has no block for anybody, so that the loop waits to be woken."""

    session_id = "router-test"

    async def open_session(self, model: object) -> None:  # type: ignore[override]
        raise AssertionError

    async def allocate(self, plan: StepPlan) -> MemoryAnswer:
        refusals = {found.row: RefusalReason.NO_BLOCKS for found in plan.admits}
        return MemoryAnswer(plan.step, {}, [], {}, [], [], refusals, 0)


class IdleCompute:
    async def get_model(self) -> None:  # type: ignore[override]
        raise AssertionError

    async def open_steps(self, session_id: str, generation: int, pool_id: str) -> None:
        raise AssertionError

    def submit(self, batch: StepBatch) -> asyncio.Future[StepResult | StepFailure]:
        raise AssertionError


class ReturningEngine(IdleCompute, RefusingMemory):
    """Breaks its stream at the first step and is back at once, with other terms than before."""

    async def get_model(self) -> str:  # type: ignore[override]
        return "model"

    async def open_session(self, model: object) -> str:  # type: ignore[override]
        return "other terms"

    async def allocate(self, plan: StepPlan) -> MemoryAnswer:
        raise StreamLost("memory service", NotReady("it is gone"))


def test_an_engine_with_other_terms_ends_the_loop() -> None:
    """Requests were checked against the old ones: nothing is sent under the new, and the reason comes out."""

    def refuse(model: object, terms: object) -> None:
        assert (model, terms) == ("model", "other terms")
        raise StartupError("other settings")

    async def scenario() -> None:
        scheduler = Scheduler(SchedulerLimits(16, 4, 64, 0, 4), Tally())
        engine = ReturningEngine()
        loop = StepLoop(scheduler, engine, engine, Tally(), refuse)
        scheduler.add(make_request("waiting", [1, 2, 3]))
        with pytest.raises(StartupError, match="other settings"):
            await loop.run()

    asyncio.run(scenario())


@pytest.mark.parametrize("num_turns", range(6))
def test_a_wake_does_not_swallow_the_end(num_turns: int) -> None:
    """Every request ends with a wake, and a router that is told to stop had a last request: both may come together."""

    async def scenario() -> None:
        scheduler = Scheduler(SchedulerLimits(16, 4, 64, 0, 4), Tally())
        loop = StepLoop(scheduler, RefusingMemory(), IdleCompute(), Tally())
        scheduler.add(make_request("waiting", [1, 2, 3]))
        running = asyncio.create_task(loop.run())
        await asyncio.sleep(0.005)
        loop.wake()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait({running}, timeout=1)
        assert running.cancelled()

    asyncio.run(scenario())
