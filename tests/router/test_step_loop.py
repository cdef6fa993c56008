"""The loop of steps ends when it is told to, whatever it waits for at that moment."""

from __future__ import annotations

import asyncio

import pytest
from simulated_requests import make_request

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

    async def execute(self, batch: StepBatch) -> StepResult | StepFailure:
        raise AssertionError


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
