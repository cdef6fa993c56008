"""The router's streams to the memory service and the compute service, and the messages on them."""

from __future__ import annotations

import asyncio
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from protos.common.v1 import block_pb2
from protos.compute.v1 import compute_pb2, compute_pb2_grpc
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from quire.rpc_status import from_rpc_error
from quire.serving import CHANNEL_OPTIONS
from router.ordered_stream import OrderedStream
from router.step import (
    Admission,
    MemoryAnswer,
    RefusalReason,
    ReleaseReason,
    StepFailure,
    StepResult,
    TokenLogprobs,
)

if TYPE_CHECKING:
    from router.request import Request, Sequence
    from router.step import Fork, StepBatch, StepPlan

_GET_MODEL_TIMEOUT_S = 5.0
_RELEASE_REASONS = {
    reason: memory_pb2.ReleaseReason.Value(f"RELEASE_REASON_{reason.name}")
    for reason in ReleaseReason
}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the compute service serves."""

    folder: Path
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    architecture: str
    dtype: str
    pool_id: str
    writer_generation: int

    @property
    def kind(self) -> tuple[str, str, int, int]:
        """What must not change while requests live."""
        return (str(self.folder), self.dtype, self.max_model_len, self.vocab_size)


@dataclass(frozen=True, slots=True)
class SessionTerms:
    """What the memory service said when the session was opened or resumed."""

    generation: int
    last_applied_step: int
    block_size: int
    num_blocks: int  # the null block included
    prefix_cache_enabled: bool
    held_rows: tuple[int, ...]  # rows whose sequences memory still holds


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to another service of ours; it connects by itself and again after a loss."""
    return grpc.aio.insecure_channel(
        address,
        options=(
            *CHANNEL_OPTIONS,
            # A service that restarts is looked for again at once, not after gRPC's two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            # A Pod that is replaced has another address under the same name.
            ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        ),
    )


class MemoryClient:
    """The router's session with the memory service."""

    def __init__(self, address: str, session_id: str, max_num_rows: int) -> None:
        self._channel = open_channel(address)
        self._stub = memory_pb2_grpc.MemoryServiceStub(self._channel)
        self.session_id = session_id
        self._max_num_rows = max_num_rows
        self._generation = 0
        self._stream: (
            OrderedStream[memory_pb2.SessionRequest, memory_pb2.SessionResponse] | None
        ) = None

    async def open_session(self, model: ServedModel) -> SessionTerms:
        """Open the session, or resume it on a new stream; raises StreamLost."""
        if self._stream is not None:
            self._stream.cancel()
        self._stream = OrderedStream("memory service", self._stub.Session)
        hello = memory_pb2.SessionHello(
            session_id=self.session_id,
            pool_id=model.pool_id,
            writer_generation=model.writer_generation,
            max_num_rows=self._max_num_rows,
        )
        response = await self._stream.ask(memory_pb2.SessionRequest(hello=hello))
        welcome = response.welcome
        self._generation = welcome.generation
        return SessionTerms(
            generation=welcome.generation,
            last_applied_step=welcome.last_applied_step,
            block_size=welcome.block_size,
            num_blocks=welcome.num_blocks,
            prefix_cache_enabled=welcome.prefix_cache_enabled,
            held_rows=tuple(sequence.row for sequence in welcome.sequences),
        )

    async def allocate(self, plan: StepPlan) -> MemoryAnswer:
        """Ask for what `plan` needs; raises StreamLost."""
        assert self._stream is not None
        step = _allocate_step(plan, self._generation)
        response = await self._stream.ask(memory_pb2.SessionRequest(step=step))
        return _memory_answer(response.answer)

    async def close(self) -> None:
        """End the session: memory releases all that it holds."""
        if self._stream is not None:
            goodbye = memory_pb2.SessionGoodbye()
            await self._stream.close(memory_pb2.SessionRequest(goodbye=goodbye))
        await self._channel.close()


class ComputeClient:
    """The router's stream of steps to the compute service."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address)
        self._stub = compute_pb2_grpc.ComputeServiceStub(self._channel)
        self._generation = 0
        self._epoch = 0
        self._stream: (
            OrderedStream[compute_pb2.ExecuteRequest, compute_pb2.ExecuteResponse] | None
        ) = None

    async def get_model(self) -> ServedModel:
        """What is served; raises QuireError while the service is away or loads."""
        try:
            found = await self._stub.GetModel(
                compute_pb2.GetModelRequest(), timeout=_GET_MODEL_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return ServedModel(
            folder=Path(found.model_folder),
            max_model_len=found.max_model_len,
            vocab_size=found.vocab_size,
            eos_token_ids=frozenset(found.eos_token_ids),
            architecture=found.architecture,
            dtype=found.dtype,
            pool_id=found.pool_id,
            writer_generation=found.writer_generation,
        )

    async def open_steps(self, session_id: str, generation: int, pool_id: str) -> None:
        """Open a stream for the steps of a session generation; raises StreamLost."""
        if self._stream is not None:
            self._stream.cancel()
        self._stream = OrderedStream("compute service", self._stub.Execute)
        hello = compute_pb2.ExecuteHello(
            session_id=session_id, generation=generation, pool_id=pool_id
        )
        response = await self._stream.ask(compute_pb2.ExecuteRequest(hello=hello))
        self._generation = generation
        self._epoch = response.welcome.epoch

    def submit(self, batch: StepBatch) -> asyncio.Future[StepResult | StepFailure]:
        """Send a step as it is now; steps run in the order of these calls. The future raises StreamLost."""
        step = _execute_step(batch, self._generation, self._epoch)
        return asyncio.ensure_future(self._execute(compute_pb2.ExecuteRequest(step=step)))

    async def _execute(self, request: compute_pb2.ExecuteRequest) -> StepResult | StepFailure:
        assert self._stream is not None
        response = await self._stream.ask(request)
        if response.WhichOneof("message") == "failure":
            self._epoch = response.failure.epoch
            return StepFailure(response.failure.step, response.failure.message)
        return _step_result(response.result)

    async def close(self) -> None:
        """End the stream."""
        if self._stream is not None:
            await self._stream.close()
        await self._channel.close()


def _allocate_step(plan: StepPlan, generation: int) -> memory_pb2.AllocateStep:
    return memory_pb2.AllocateStep(
        generation=generation,
        step=plan.step,
        acknowledged_step=plan.acknowledged_step,
        commit_rows=plan.commits.rows,
        commit_num_computed_tokens=plan.commits.num_computed_tokens,
        commit_token_ids=b"".join(plan.commits.token_ids),
        release_rows=[release.row for release in plan.releases],
        release_reasons=[_RELEASE_REASONS[release.reason] for release in plan.releases],
        forks=[_fork_demand(fork) for fork in plan.forks],
        extend_rows=plan.extends.rows,
        extend_starts=plan.extends.starts,
        extend_num_tokens=plan.extends.num_tokens,
        admits=[_admit_demand(sequence) for sequence in plan.admits],
        admit_token_budget=plan.admit_token_budget,
        watermark_blocks=plan.watermark_blocks,
    )


def _fork_demand(fork: Fork) -> memory_pb2.ForkDemand:
    return memory_pb2.ForkDemand(
        src_row=fork.parent_row,
        dst_row=fork.child.row,
        dst_incarnation=fork.child.incarnation,
        sequence_id=fork.child.sequence_id,
        request_id=fork.child.request.request_id,
        num_tokens=fork.num_tokens,
    )


def _admit_demand(sequence: Sequence) -> memory_pb2.AdmitDemand:
    return memory_pb2.AdmitDemand(
        row=sequence.row,
        incarnation=sequence.incarnation,
        sequence_id=sequence.sequence_id,
        request_id=sequence.request.request_id,
        token_ids=sequence.token_ids.tobytes(),
        num_sequences=sequence.num_sequences,
        tenant=sequence.request.tenant,
    )


def _memory_answer(answer: memory_pb2.AllocateAnswer) -> MemoryAnswer:
    return MemoryAnswer(
        step=answer.step,
        admissions={
            found.row: Admission(
                found.num_cached_tokens, found.num_scheduled_tokens, _unpack(found.block_table)
            )
            for found in answer.admissions
        },
        new_blocks=list(zip(answer.new_block_rows, answer.new_block_ids, strict=True)),
        forked_tables={found.row: _unpack(found.block_table) for found in answer.forked_tables},
        copies=[(found.src_block_id, found.dst_block_id) for found in answer.copies],
        remaps=list(
            zip(answer.remap_rows, answer.remap_indexes, answer.remap_block_ids, strict=True)
        ),
        refusals={found.row: RefusalReason(found.reason) for found in answer.refusals},
        num_available_blocks=answer.num_available_blocks,
    )


def _execute_step(batch: StepBatch, generation: int, epoch: int) -> compute_pb2.ExecuteStep:
    return compute_pb2.ExecuteStep(
        generation=generation,
        step=batch.step,
        epoch=epoch,
        reset=batch.reset,
        drop_rows=batch.drop_rows,
        new_rows=[_row_state(sequence) for sequence in batch.new_rows],
        forks=[_row_fork(fork) for fork in batch.forks],
        append_rows=[row for row, _ in batch.appends],
        append_block_ids=[block_id for _, block_id in batch.appends],
        remap_rows=[row for row, _, _ in batch.remaps],
        remap_indexes=[index for _, index, _ in batch.remaps],
        remap_block_ids=[block_id for _, _, block_id in batch.remaps],
        copies=[
            block_pb2.BlockCopy(src_block_id=src, dst_block_id=dst) for src, dst in batch.copies
        ],
        rows=batch.work.rows,
        starts=batch.work.starts,
        num_tokens=batch.work.num_tokens,
        pending_rows=batch.pending.rows,
        pending_steps=batch.pending.steps,
        pending_outputs=batch.pending.outputs,
        output_rows=batch.outputs.source_rows,
        output_samples=[sequence.sample_index for sequence in batch.outputs.sequences],
    )


def _row_state(sequence: Sequence) -> compute_pb2.RowState:
    return compute_pb2.RowState(
        row=sequence.row,
        incarnation=sequence.incarnation,
        block_table=_pack(sequence.block_table),
        token_ids=sequence.token_ids.tobytes(),
        num_prompt_tokens=sequence.num_prompt_tokens,
        sampling=_sampling_settings(sequence.request),
    )


def _row_fork(fork: Fork) -> compute_pb2.RowFork:
    return compute_pb2.RowFork(
        src_row=fork.parent_row,
        dst_row=fork.child.row,
        dst_incarnation=fork.child.incarnation,
        block_table=_pack(fork.child.block_table),
        num_tokens=fork.num_tokens,
        source_step=fork.source_step,
        source_output=fork.source_output,
    )


def _sampling_settings(request: Request) -> compute_pb2.SamplingSettings:
    sampling = request.sampling
    return compute_pb2.SamplingSettings(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=request.seed,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        bias_token_ids=[token_id for token_id, _ in sampling.logit_bias],
        bias_values=[bias for _, bias in sampling.logit_bias],
        num_logprobs=-1 if sampling.num_logprobs is None else sampling.num_logprobs,
        min_tokens=request.stopping.min_tokens,
        suppressed_token_ids=request.suppressed_token_ids,
    )


def _step_result(result: compute_pb2.StepResult) -> StepResult:
    token_ids = list(result.token_ids)
    return StepResult(
        step=result.step,
        token_ids=token_ids,
        incarnations=list(result.incarnations),
        logprobs={
            found.output: TokenLogprobs(
                token_ids[found.output],
                found.logprob,
                tuple(zip(found.top_token_ids, found.top_logprobs, strict=True)),
            )
            for found in result.logprobs
        },
        device_us=result.device_us,
    )


def _pack(numbers: list[int]) -> bytes:
    return array("i", numbers).tobytes()


def _unpack(packed: bytes) -> list[int]:
    numbers = array("i")
    numbers.frombytes(packed)
    return numbers.tolist()
