"""The compute service's stream of steps without messages, for a router in the same process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from compute_service.metrics import EngineTally
from compute_service.sampling import RowSampling
from compute_service.step import ForkRow, NewRow, Step, StepFailed
from router.clients import ServedModel
from router.step import StepFailure, StepResult

if TYPE_CHECKING:
    from compute_service.clients import AttachedPool
    from compute_service.engine import Answer, Engine
    from compute_service.model_loader import LoadedModel
    from router.request import Request, Sequence
    from router.step import Fork, StepBatch


class InProcessCompute:
    """Steps of one session. Called on the loop; the engine runs on another thread."""

    def __init__(self, engine: Engine, loaded: LoadedModel, pool: AttachedPool) -> None:
        self._engine = engine
        self._loaded = loaded
        self._pool = pool
        self._tally = EngineTally()
        self._generation = 0
        self._epoch = 0

    async def get_model(self) -> ServedModel:
        """What is served."""
        loaded = self._loaded
        return ServedModel(
            folder=loaded.folder,
            max_model_len=loaded.max_model_len,
            vocab_size=loaded.vocab_size,
            eos_token_ids=frozenset(loaded.eos_token_ids),
            architecture=loaded.architecture,
            dtype=str(loaded.dtype),
            pool_id=self._pool.pool_id,
            writer_generation=self._pool.writer_generation,
        )

    async def open_steps(self, _session_id: str, generation: int, _pool_id: str) -> None:
        """Steps of this generation come."""
        self._engine.announce(generation)
        self._generation, self._epoch = generation, self._engine.epoch

    def submit(self, batch: StepBatch) -> asyncio.Future[StepResult | StepFailure]:
        """Queue a step."""
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[StepResult | StepFailure] = loop.create_future()
        step = _step(batch, self._generation, self._epoch)

        def answered(answer: Answer) -> None:
            self._tally.answered(step, answer)
            loop.call_soon_threadsafe(self._take, outcome, answer)

        self._engine.submit(step, answered)
        return outcome

    def _take(self, outcome: asyncio.Future[StepResult | StepFailure], answer: Answer) -> None:
        if isinstance(answer, StepFailed):
            self._epoch = answer.epoch
        if not outcome.cancelled():
            outcome.set_result(_outcome(answer))


def _step(batch: StepBatch, generation: int, epoch: int) -> Step:
    return Step(
        generation=generation,
        number=batch.step,
        epoch=epoch,
        reset=batch.reset,
        drop_rows=tuple(batch.drop_rows),
        new_rows=tuple(_new_row(found) for found in batch.new_rows),
        forks=tuple(_fork_row(found) for found in batch.forks),
        appends=tuple(batch.appends),
        remaps=tuple(batch.remaps),
        copies=tuple(batch.copies),
        rows=tuple(batch.work.rows),
        starts=tuple(batch.work.starts),
        num_tokens=tuple(batch.work.num_tokens),
        pending=tuple(batch.pending),
        outputs=tuple((found.source_row, found.sequence.sample_index) for found in batch.outputs),
    )


def _new_row(sequence: Sequence) -> NewRow:
    return NewRow(
        row=sequence.row,
        incarnation=sequence.incarnation,
        block_table=np.array(sequence.block_table, dtype=np.int32),
        token_ids=np.array(sequence.token_ids, dtype=np.int32),
        num_prompt_tokens=sequence.num_prompt_tokens,
        sampling=_sampling(sequence.request),
    )


def _fork_row(fork: Fork) -> ForkRow:
    return ForkRow(
        src_row=fork.parent_row,
        dst_row=fork.child.row,
        dst_incarnation=fork.child.incarnation,
        block_table=np.array(fork.child.block_table, dtype=np.int32),
        num_tokens=fork.num_tokens,
        source_step=fork.source_step,
        source_output=fork.source_output,
    )


def _sampling(request: Request) -> RowSampling:
    sampling = request.sampling
    return RowSampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=request.seed,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=sampling.logit_bias,
        num_logprobs=-1 if sampling.num_logprobs is None else sampling.num_logprobs,
        min_tokens=request.stopping.min_tokens,
        suppressed_token_ids=request.suppressed_token_ids,
    )


def _outcome(answer: Answer) -> StepResult | StepFailure:
    """Log-probabilities are not asked for here."""
    if isinstance(answer, StepFailed):
        return StepFailure(answer.number, answer.message)
    return StepResult(
        step=answer.number,
        token_ids=[token.token_id for token in answer.tokens],
        incarnations=list(answer.incarnations),
        logprobs={},
        device_us=answer.device_us,
    )
