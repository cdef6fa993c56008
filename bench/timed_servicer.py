"""A compute service without a model: a step is over after a fixed time, its tokens come from a text.

    python -m bench.timed_servicer ADDRESS POOL_ID WRITER_GENERATION STEP_MS

It stands for a device that leaves the processors alone. Steps run one after another, also when several are in flight.
"""

from __future__ import annotations

import asyncio
import sys
import time
from itertools import cycle, islice
from typing import TYPE_CHECKING

from protos.compute.v1 import compute_pb2 as pb
from protos.compute.v1 import compute_pb2_grpc
from quire import demo_model, serving
from router.tokenizer import ModelTokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import grpc

VOCAB_SIZE, MAX_MODEL_LEN = 4096, 16_384
_Arrival = tuple[pb.ExecuteStep, float]  # and when it came
_TEXT = (demo_model.path().parent / "__init__.py").read_text()


class TimedCompute(compute_pb2_grpc.ComputeServiceServicer):
    """Implements as much of `quire.compute.v1.ComputeService` as a router asks for whose steps all succeed."""

    def __init__(self, pool_id: str, writer_generation: int, step_s: float) -> None:
        self._pool_id = pool_id
        self._writer_generation = writer_generation
        self._step_s = step_s
        tokenizer = ModelTokenizer(demo_model.path() / "tokenizer.json")
        self._tokens = cycle(tokenizer.encode(_TEXT, add_special_tokens=False))

    async def GetModel(
        self,
        request: pb.GetModelRequest,
        context: grpc.aio.ServicerContext[pb.GetModelRequest, pb.GetModelResponse],
    ) -> pb.GetModelResponse:
        """Describe the model that there is not; its tokenizer is the demo model's."""
        return pb.GetModelResponse(
            model_folder=str(demo_model.path()),
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            architecture="none",
            dtype="float32",
            pool_id=self._pool_id,
            writer_generation=self._writer_generation,
        )

    async def Execute(
        self,
        request_iterator: AsyncIterator[pb.ExecuteRequest],
        context: grpc.aio.ServicerContext[pb.ExecuteRequest, pb.ExecuteResponse],
    ) -> AsyncIterator[pb.ExecuteResponse]:
        """Answer each step when its time is over."""
        steps: asyncio.Queue[_Arrival | None] = asyncio.Queue()
        reading = asyncio.create_task(_read(request_iterator, steps))
        try:
            yield pb.ExecuteResponse(welcome=pb.ExecuteWelcome(epoch=1))
            async for result in self._results(steps):
                yield pb.ExecuteResponse(result=result)
        finally:
            reading.cancel()

    async def _results(self, steps: asyncio.Queue[_Arrival | None]) -> AsyncIterator[pb.StepResult]:
        incarnations: dict[int, int] = {}
        free_at = 0.0
        while (arrival := await steps.get()) is not None:
            step, arrived_at = arrival
            incarnations.update({new.row: new.incarnation for new in step.new_rows})
            free_at = max(free_at, arrived_at) + self._step_s
            result = pb.StepResult(
                generation=step.generation,
                step=step.step,
                token_ids=islice(self._tokens, len(step.output_rows)),
                incarnations=[incarnations[row] for row in step.output_rows],
                device_us=int(self._step_s * 1e6),
            )
            await asyncio.sleep(free_at - time.perf_counter())
            yield result


async def _read(
    requests: AsyncIterator[pb.ExecuteRequest], steps: asyncio.Queue[_Arrival | None]
) -> None:
    async for message in requests:
        if message.HasField("step"):
            steps.put_nowait((message.step, time.perf_counter()))
    steps.put_nowait(None)


async def _serve(address: str, pool_id: str, writer_generation: int, step_s: float) -> None:
    stop = asyncio.Event()
    serving.install_stop_signals(asyncio.get_running_loop(), stop)
    server = serving.create_server()
    servicer = TimedCompute(pool_id, writer_generation, step_s)
    compute_pb2_grpc.add_ComputeServiceServicer_to_server(servicer, server)
    serving.bind(server, address)
    await server.start()
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]) * 1e-3))
