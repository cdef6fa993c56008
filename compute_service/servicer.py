"""The gRPC face of the compute service. It runs on a side thread; the engine has the main one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog

from compute_service.sampling import RowSampling
from compute_service.step import ForkRow, NewRow, Step, StepDone
from protos.compute.v1 import compute_pb2 as pb
from protos.compute.v1 import compute_pb2_grpc
from quire.errors import BrokenContract, NotReady, PoolMismatch, SessionFenced

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    import grpc
    from numpy.typing import NDArray

    from compute_service.clients import AttachedPool
    from compute_service.engine import Answer, Engine
    from compute_service.metrics import EngineTally
    from compute_service.model_loader import LoadedModel
    from compute_service.step import StepFailed


_logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Served:
    """What is there once the model is loaded."""

    engine: Engine
    loaded: LoadedModel
    pool: AttachedPool


class ComputeServicer(compute_pb2_grpc.ComputeServiceServicer):
    """Implements `quire.compute.v1.ComputeService`; that file holds the contract."""

    def __init__(self, tally: EngineTally) -> None:
        self._tally = tally
        self._served: _Served | None = None
        self._current: _StepStream | None = None

    def serve(self, engine: Engine, loaded: LoadedModel, pool: AttachedPool) -> None:
        """From now on calls are answered; before, they end with NOT_READY."""
        self._served = _Served(engine, loaded, pool)

    def _ready(self) -> _Served:
        if self._served is None:
            raise NotReady("the model is still being loaded", retry_after_s=1.0)
        return self._served

    async def GetModel(
        self,
        request: pb.GetModelRequest,
        context: grpc.aio.ServicerContext[pb.GetModelRequest, pb.GetModelResponse],
    ) -> pb.GetModelResponse:
        """Describe the model."""
        served = self._ready()
        loaded = served.loaded
        return pb.GetModelResponse(
            model_folder=str(loaded.folder),
            max_model_len=loaded.max_model_len,
            vocab_size=loaded.vocab_size,
            eos_token_ids=loaded.eos_token_ids,
            architecture=loaded.architecture,
            dtype=str(loaded.dtype).removeprefix("torch."),
            fingerprint=loaded.fingerprint,
            pool_id=served.pool.pool_id,
            writer_generation=served.pool.writer_generation,
            epoch=served.engine.epoch,
        )

    async def Execute(
        self,
        request_iterator: AsyncIterator[pb.ExecuteRequest],
        context: grpc.aio.ServicerContext[pb.ExecuteRequest, pb.ExecuteResponse],
    ) -> AsyncIterator[pb.ExecuteResponse]:
        """Run the steps of one session."""
        served = self._ready()
        hello = await anext(aiter(request_iterator), None)
        if hello is None:
            return
        stream = self._open(served, hello)
        yield pb.ExecuteResponse(
            welcome=pb.ExecuteWelcome(
                epoch=served.engine.epoch, writer_generation=served.pool.writer_generation
            )
        )
        reader = asyncio.create_task(stream.read(request_iterator))
        try:
            async for response in stream.responses():
                yield response
        finally:
            reader.cancel()

    def _open(self, served: _Served, message: pb.ExecuteRequest) -> _StepStream:
        if message.WhichOneof("message") != "hello":
            raise BrokenContract("the first message of a stream is hello")
        hello, pool_id = message.hello, served.pool.pool_id
        if hello.pool_id != pool_id:
            raise PoolMismatch(
                f"this service writes to pool {pool_id}, not {hello.pool_id!r}",
                metadata={"pool_id": hello.pool_id, "expected_pool_id": pool_id},
            )
        if not served.engine.announce(hello.generation):
            raise _fenced(hello)
        if self._current is not None:
            self._current.fence(_fenced(hello))
        _logger.info("session_opened", session_id=hello.session_id, generation=hello.generation)
        self._current = _StepStream(served.engine, self._tally, hello.generation)
        return self._current


class _StepStream:
    """One stream: steps go to the engine, its answers come back in order."""

    def __init__(self, engine: Engine, tally: EngineTally, generation: int) -> None:
        self._engine = engine
        self._tally = tally
        self._generation = generation
        self._loop = asyncio.get_running_loop()
        self._answers: asyncio.Queue[Answer | Exception | None] = asyncio.Queue()
        self._num_in_flight = 0
        self._is_half_closed = False

    def fence(self, error: SessionFenced) -> None:
        """A newer stream began: this one ends."""
        self._answers.put_nowait(error)

    async def read(self, requests: AsyncIterator[pb.ExecuteRequest]) -> None:
        """Queue every step until the router half-closes."""
        try:
            async for message in requests:
                self._num_in_flight += 1
                step = self._step(message)
                self._engine.submit(step, partial(self._answered, step))
        except Exception as error:  # noqa: BLE001 -- carried to the stream's own task, which ends the call with it
            self._answers.put_nowait(error)
            return
        self._is_half_closed = True
        if not self._num_in_flight:
            self._answers.put_nowait(None)

    async def responses(self) -> AsyncIterator[pb.ExecuteResponse]:
        """Answers in order; raises what ends the stream."""
        while (answer := await self._answers.get()) is not None:
            if isinstance(answer, Exception):
                raise answer
            yield _response(answer)
            self._num_in_flight -= 1
            if self._is_half_closed and not self._num_in_flight:
                return

    def _step(self, message: pb.ExecuteRequest) -> Step:
        if message.WhichOneof("message") != "step":
            raise BrokenContract("every message after hello is a step")
        if message.step.generation != self._generation:
            reason = f"generation {message.step.generation} on a stream of {self._generation}"
            raise BrokenContract(reason)
        return _step(message.step)

    def _answered(self, step: Step, answer: Answer) -> None:
        """Called on the engine's thread."""
        self._tally.answered(step, answer)
        self._loop.call_soon_threadsafe(self._answers.put_nowait, answer)


def _fenced(hello: pb.ExecuteHello) -> SessionFenced:
    return SessionFenced(
        f"generation {hello.generation} of session {hello.session_id!r} ends another stream",
        metadata={"session_id": hello.session_id, "generation": hello.generation},
    )


def _step(message: pb.ExecuteStep) -> Step:
    # A slice of a repeated field is a list made in C; to iterate over the field itself takes twice as long.
    return Step(
        generation=message.generation,
        number=message.step,
        epoch=message.epoch,
        reset=message.reset,
        drop_rows=tuple(message.drop_rows),
        new_rows=tuple(_new_row(found) for found in message.new_rows),
        forks=tuple(_fork(found) for found in message.forks),
        appends=_parallel(message.append_rows, message.append_block_ids),
        remaps=_parallel(message.remap_rows, message.remap_indexes, message.remap_block_ids),
        copies=tuple((copy.src_block_id, copy.dst_block_id) for copy in message.copies),
        rows=tuple(message.rows[:]),
        starts=tuple(message.starts[:]),
        num_tokens=tuple(message.num_tokens[:]),
        pending=_parallel(
            message.pending_rows[:], message.pending_steps[:], message.pending_outputs[:]
        ),
        outputs=_parallel(message.output_rows[:], message.output_samples[:]),
    )


def _new_row(message: pb.RowState) -> NewRow:
    return NewRow(
        row=message.row,
        incarnation=message.incarnation,
        block_table=_unpack(message.block_table),
        token_ids=_unpack(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=_sampling(message.sampling),
    )


def _fork(message: pb.RowFork) -> ForkRow:
    return ForkRow(
        src_row=message.src_row,
        dst_row=message.dst_row,
        dst_incarnation=message.dst_incarnation,
        block_table=_unpack(message.block_table),
        num_tokens=message.num_tokens,
        source_step=message.source_step,
        source_output=message.source_output,
    )


def _sampling(message: pb.SamplingSettings) -> RowSampling:
    return RowSampling(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        seed=message.seed,
        repetition_penalty=message.repetition_penalty,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        logit_bias=_parallel(message.bias_token_ids, message.bias_values),
        num_logprobs=message.num_logprobs,
        min_tokens=message.min_tokens,
        suppressed_token_ids=tuple(message.suppressed_token_ids),
    )


def _parallel(*arrays: Iterable[Any]) -> tuple[Any, ...]:
    try:
        return tuple(zip(*arrays, strict=True))
    except ValueError as error:
        raise BrokenContract("parallel arrays of different lengths") from error


def _unpack(packed: bytes) -> NDArray[np.int32]:
    if len(packed) % 4:
        raise BrokenContract("packed int32 of a length that is not a multiple of 4")
    return np.frombuffer(packed, dtype="<i4")


def _response(answer: Answer) -> pb.ExecuteResponse:
    if isinstance(answer, StepDone):
        return pb.ExecuteResponse(result=_result(answer))
    return pb.ExecuteResponse(failure=_failure(answer))


def _result(done: StepDone) -> pb.StepResult:
    return pb.StepResult(
        generation=done.generation,
        step=done.number,
        token_ids=[token.token_id for token in done.tokens],
        incarnations=done.incarnations,
        logprobs=[
            pb.OutputLogprobs(
                output=index,
                logprob=token.logprob,
                top_token_ids=[token_id for token_id, _ in token.top],
                top_logprobs=[logprob for _, logprob in token.top],
            )
            for index, token in enumerate(done.tokens)
            if token.logprob is not None
        ],
        device_us=done.device_us,
        queued_us=done.queued_us,
    )


def _failure(failed: StepFailed) -> pb.StepFailure:
    return pb.StepFailure(
        generation=failed.generation,
        step=failed.number,
        epoch=failed.epoch,
        message=failed.message,
    )
