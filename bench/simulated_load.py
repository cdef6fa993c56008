"""Requests that all decode at once, their tokens counted instead of sent: what both sides of the comparison run."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from router.intake import Intake, IntakeLimits, Prompt
from router.sampling_params import SamplingParams, StoppingCriteria
from router.scheduler import Scheduler, SchedulerLimits
from router.step import StepResult
from router.step_loop import StepLoop
from router.tally import StepTimes, Tally
from router.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import psutil

    from quire.errors import QuireError
    from router.clients import ServedModel, SessionTerms
    from router.request import Finish
    from router.step import StepFailure
    from router.step_loop import Compute, Memory
    from router.text_output import TextOutput

BLOCK_SIZE = 16
MEMORY_BUDGET = 512 << 20
# Prompts of different lengths, so that blocks open and fill a few at a step, not all at once.
_MIN_PROMPT, _FIRST_TOKEN = BLOCK_SIZE, 300
_SETTLE_STEPS = 20  # of a round, before it is looked at


@dataclass(frozen=True, slots=True)
class Workload:
    """What one side runs in a round."""

    name: str
    model_folder: str
    step_ms: float | None  # of the simulated device; None: the model runs
    num_seqs: int
    num_steps: int

    @classmethod
    def from_json(cls, text: str) -> Workload:
        """What `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """For the command line of a process."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Round:
    """What came of a round."""

    tokens_per_s: float
    step_ms: float  # mean
    step_p50_ms: float
    step_p99_ms: float
    device_ms: float  # mean time of a step in the engine
    processor_ms: dict[str, float]  # a step, by process


@dataclass(slots=True)
class _Counted:
    """What the sinks of a round were given."""

    num_tokens: int = 0
    num_chars: int = 0
    num_live: int = 0
    error: QuireError | None = None


class CountingSink:
    """A client that reads as fast as tokens come."""

    def __init__(self, counted: _Counted, all_ended: asyncio.Event) -> None:
        self._counted = counted
        self._all_ended = all_ended

    def output(self, _sample_index: int, output: TextOutput) -> None:
        """Count what has come."""
        if (delta := output.take()) is not None:
            self._counted.num_tokens += len(delta.token_ids)
            self._counted.num_chars += len(delta.text)

    def finished(self, _finish: Finish) -> None:
        """One less to wait for."""
        self._counted.num_live -= 1
        if not self._counted.num_live:
            self._all_ended.set()

    def failed(self, error: QuireError) -> None:
        """The round is worth nothing."""
        self._counted.error = error


class StepClock(Tally):
    """A tally that tells somebody of each step, once its tokens were taken in."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: Callable[[StepResult | StepFailure], None] = lambda _: None

    def step_ended(self, times: StepTimes, outcome: StepResult | StepFailure) -> None:
        """As the tally, and tell."""
        super().step_ended(times, outcome)
        self.heard(outcome)


@dataclass(frozen=True, slots=True)
class _Moment:
    """Between two steps."""

    num_tokens: int
    processor_s: dict[str, float]


class _Window:
    """Looks at the steps in which all sequences decode: from behind the first few of them, `num_steps`."""

    def __init__(
        self, workload: Workload, counted: _Counted, processes: Mapping[str, psutil.Process]
    ) -> None:
        self._workload = workload
        self._counted = counted
        self._processes = processes
        self._ends: list[float] = []
        self._device_us: list[int] = []
        self._moments: list[_Moment] = []

    def heard(self, outcome: StepResult | StepFailure) -> None:
        """A step ended."""
        assert isinstance(outcome, StepResult), outcome
        if len(outcome.token_ids) < self._workload.num_seqs:
            return
        self._ends.append(time.perf_counter())
        self._device_us.append(outcome.device_us)
        if len(self._ends) in {_SETTLE_STEPS, _SETTLE_STEPS + self._workload.num_steps}:
            self._moments.append(_Moment(self._counted.num_tokens, self._processor_s()))

    def _processor_s(self) -> dict[str, float]:
        times = {name: process.cpu_times() for name, process in self._processes.items()}
        return {name: found.user + found.system for name, found in times.items()}

    def result(self) -> Round:
        """What was seen."""
        num_steps, (first, last) = self._workload.num_steps, self._moments
        ends = np.array(self._ends[_SETTLE_STEPS - 1 : _SETTLE_STEPS + num_steps])
        steps_ms = np.diff(ends) * 1e3
        device_us = self._device_us[_SETTLE_STEPS : _SETTLE_STEPS + num_steps]
        return Round(
            tokens_per_s=(last.num_tokens - first.num_tokens) / float(ends[-1] - ends[0]),
            step_ms=float(steps_ms.mean()),
            step_p50_ms=float(np.median(steps_ms)),
            step_p99_ms=float(np.percentile(steps_ms, 99)),
            device_ms=float(np.mean(device_us)) * 1e-3,
            processor_ms={
                name: (last.processor_s[name] - first.processor_s[name]) / num_steps * 1e3
                for name in self._processes
            },
        )


class Load:
    """A scheduler and its loop, as the router has them, and rounds of requests for them.

    Args:
        workload: what a round is.
        memory: the memory service, however it is reached.
        compute: the compute service, likewise.
        model: what compute serves.
        terms: what memory said when the session was opened.
        processes: whose processor time is told, by name.
    """

    def __init__(
        self,
        workload: Workload,
        memory: Memory,
        compute: Compute,
        model: ServedModel,
        terms: SessionTerms,
        processes: Mapping[str, psutil.Process],
    ) -> None:
        self._workload = workload
        self._processes = processes
        self._clock = StepClock()
        self._intake = Intake(_intake_limits(workload, model, terms), load_tokenizer(model.folder))
        self._scheduler = Scheduler(_scheduler_limits(workload, terms), self._clock)
        self._loop = StepLoop(self._scheduler, memory, compute, self._clock)

    async def answer_rounds(self) -> None:
        """Run a round for each number that comes on standard input, and print what came of it, until that ends."""
        steps = asyncio.create_task(self._loop.run())
        print("ready", flush=True)
        while number := await asyncio.to_thread(sys.stdin.readline):
            found = await self._round(int(number), steps)
            print(json.dumps(asdict(found)), flush=True)
        steps.cancel()

    async def _round(self, number: int, steps: asyncio.Task[None]) -> Round:
        counted, all_ended = _Counted(num_live=self._workload.num_seqs), asyncio.Event()
        window = _Window(self._workload, counted, self._processes)
        self._clock.heard = window.heard
        sink = CountingSink(counted, all_ended)
        for index, prompt in enumerate(self._prompts(number)):
            self._add(f"{number}-{index}", prompt, sink)
        self._loop.wake()
        waiting = asyncio.create_task(all_ended.wait())
        await asyncio.wait({waiting, steps}, return_when=asyncio.FIRST_COMPLETED)
        if steps.done():
            await steps  # it ends by an error alone
        assert counted.error is None, counted.error
        assert counted.num_chars
        return window.result()

    def _prompts(self, number: int) -> list[list[int]]:
        """Other prompts in each round: none is found in the prefix cache."""
        random = np.random.default_rng(number)
        return [
            random.integers(_FIRST_TOKEN, 4000, _MIN_PROMPT + index % BLOCK_SIZE).tolist()
            for index in range(self._workload.num_seqs)
        ]

    def _add(self, request_id: str, prompt: list[int], sink: CountingSink) -> None:
        # Sequences come in over several steps, and leave likewise: more are run than looked at.
        max_tokens = _SETTLE_STEPS + self._workload.num_steps + self._workload.num_seqs // 4
        request = self._intake.build(
            request_id,
            Prompt(prompt, "prompt"),
            SamplingParams(temperature=0),
            StoppingCriteria(max_tokens=max_tokens, ignore_eos=True),
            priority=0,
            sink=sink,
            tenant="",
        )
        self._scheduler.add(request)
        self._clock.accepted(request, self._clock.now())


def _intake_limits(workload: Workload, model: ServedModel, terms: SessionTerms) -> IntakeLimits:
    return IntakeLimits(
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        eos_token_ids=model.eos_token_ids,
        block_size=terms.block_size,
        num_blocks=terms.num_blocks,
        max_num_seqs=workload.num_seqs,
    )


def _scheduler_limits(workload: Workload, terms: SessionTerms) -> SchedulerLimits:
    return SchedulerLimits(
        block_size=terms.block_size,
        max_num_seqs=workload.num_seqs,
        max_num_batched_tokens=2 * BLOCK_SIZE * workload.num_seqs,  # all prompts in one step
        watermark_blocks=0,
        queue_limit=workload.num_seqs,
    )
