"""The engine: runs steps strictly in order, on the thread that calls `run`."""

from __future__ import annotations

import queue
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import torch

from compute_service.batch import null_batch, pack_step
from compute_service.rows import RowStore
from compute_service.sampling import sample, warm_up
from compute_service.step import StepDone, StepError, StepFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from compute_service.forward import ForwardPass
    from compute_service.sampling import SampledToken
    from compute_service.step import Step
    from kernels.launcher import Kernels

_logger = structlog.get_logger()

Answer = StepDone | StepFailed


@dataclass(frozen=True, slots=True)
class _Queued:
    """A step that waits for the device."""

    step: Step
    answer: Callable[[Answer], None]  # called on the engine's thread
    queued_at: float


class Engine:
    """Owns the rows and the device.

    Steps of a lower generation are dropped once a higher one was announced. After a failed step the epoch changes, and
    only a reset that names the new one is run.
    """

    def __init__(
        self,
        forward: ForwardPass,
        kernels: Kernels,
        caches: Sequence[tuple[Tensor, Tensor]],
        block_size: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._kernels = kernels
        self._caches = caches
        self._block_size = block_size
        self._device = device
        self._rows = RowStore()
        self._queue: queue.SimpleQueue[_Queued | None] = queue.SimpleQueue()
        self._generation = 0  # highest announced; written by the gRPC thread, read by the engine's
        self._ran_generation = 0  # generation of the last step that ran
        self._last_step = 0
        self._epoch = _new_epoch()
        self._is_fresh = True  # nothing ran in this epoch: a reset has to come first

    @property
    def epoch(self) -> int:
        """Changes at start and after each failed step."""
        return self._epoch

    def announce(self, generation: int) -> bool:
        """A stream of this generation begins, older ones end; False when a newer one was there already."""
        if generation < self._generation:
            return False
        self._generation = generation
        return True

    def submit(self, step: Step, answer: Callable[[Answer], None]) -> None:
        """Queue a step; `answer` is called with its end, unless its generation is over."""
        self._queue.put(_Queued(step, answer, time.perf_counter()))

    def stop(self) -> None:
        """Let `run` return after the steps that are queued."""
        self._queue.put(None)

    def warm_up(self) -> None:
        """One pass over a decode and a chunk, so that no request waits for a compiler; it writes to the null block."""
        zeros = torch.zeros(3, dtype=torch.int64, device=self._device)
        warm_up(self._forward(zeros, zeros, null_batch(self._device), zeros[:2]))

    def run(self) -> None:
        """Run steps until stopped."""
        while (queued := self._queue.get()) is not None:
            if queued.step.generation >= self._generation:
                queued.answer(self._answer(queued))

    def _answer(self, queued: _Queued) -> Answer:
        step = queued.step
        is_fresh = self._is_fresh or step.generation != self._ran_generation
        if step.epoch != self._epoch or (is_fresh and not step.reset):
            return StepFailed(step.generation, step.number, self._epoch, "")
        started = time.perf_counter()
        try:
            tokens = self._execute(step)
        except Exception as error:  # noqa: BLE001 -- whatever fails, the router hears of it and the service goes on
            return self._fail(step, error)
        ended = time.perf_counter()
        return StepDone(
            step.generation,
            step.number,
            tokens,
            tuple(self._rows[row].incarnation for row, _ in step.outputs),
            device_us=round((ended - started) * 1e6),
            queued_us=round((started - queued.queued_at) * 1e6),
        )

    def _execute(self, step: Step) -> tuple[SampledToken, ...]:
        self._check_order(step)
        self._rows.apply(step)
        self._copy_blocks(step)
        packed = pack_step(step, self._rows, self._block_size, self._device)
        logits = self._forward(
            packed.token_ids, packed.position_ids, packed.batch, packed.output_rows
        )
        tokens = tuple(sample(logits, packed.sample_rows)) if packed.sample_rows else ()
        self._rows.keep_outputs(step, tuple(token.token_id for token in tokens))
        self._is_fresh = False
        self._ran_generation = step.generation
        return tokens

    def _check_order(self, step: Step) -> None:
        same_generation = step.generation == self._ran_generation
        if same_generation and step.number <= self._last_step:
            message = f"step {step.number} does not rise above {self._last_step}"
            raise StepError(message)
        self._last_step = step.number

    def _copy_blocks(self, step: Step) -> None:
        if not step.copies:
            return
        # The copies of a reset may come from several answers: the destination of one may be the source of the next.
        groups = [[copy] for copy in step.copies] if step.reset else [list(step.copies)]
        for group in groups:
            self._kernels.copy_blocks(self._caches, group)

    def _fail(self, step: Step, error: Exception) -> StepFailed:
        # The record `session_opened` of this generation names the session.
        where = {"generation": step.generation, "step": step.number}
        if isinstance(error, StepError | ValueError):
            _logger.warning("step_failed", **where, reason=str(error))
        else:
            _logger.error("step_failed", **where, exc_info=error)
        self._epoch = _new_epoch()
        self._is_fresh = True
        self._rows.clear()
        message = " ".join(str(error).split()) or type(error).__name__
        return StepFailed(step.generation, step.number, self._epoch, message)


def _new_epoch() -> int:
    return secrets.randbits(62) + 1
