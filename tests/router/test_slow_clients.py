"""A client that stops reading, over a real connection: it costs nobody else anything, and loses nothing."""

from __future__ import annotations

import asyncio
from array import array
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import grpc

from protos.router.v1 import router_pb2 as pb
from protos.router.v1 import router_pb2_grpc
from quire import demo_model
from quire.serving import create_server
from router import messages
from router.intake import Intake, IntakeLimits
from router.request import FinishReason, Request, Sequence, first_sequence
from router.servicer import RouterServicer
from router.step import TokenLogprobs
from router.tally import Tally
from router.tenants import OneTenant
from router.text_output import OutputDelta, TextOutput
from router.tokenizer import ModelTokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from router.node import Node

TOKENIZER = ModelTokenizer(demo_model.path() / "tokenizer.json")
TOKENS = TOKENIZER.encode("ein Bär, 熊, 🐻 und so weiter: " * 40, add_special_tokens=False)
NUM_TOKENS, NUM_LOGPROBS = len(TOKENS), 20


@dataclass
class HandFedNode:
    """A node whose tokens the test samples itself."""

    tally: Tally = field(default_factory=Tally)
    sequences: list[Sequence] = field(default_factory=list)
    is_draining: bool = False
    tokenizer: ModelTokenizer = TOKENIZER
    intake: Intake = field(
        default_factory=lambda: Intake(
            IntakeLimits(4096, 8192, frozenset(), 16, 10_000, 8), TOKENIZER
        )
    )

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.sequences[0].request.prompt_token_ids.tolist()

    def add(self, request: Request, received_at: float) -> None:
        self.sequences.append(first_sequence(request))

    def abort(self, request: Request) -> None:
        if not request.is_finished:
            request.finish_sample(0, FinishReason.CANCELLED)


@asynccontextmanager
async def router(node: HandFedNode) -> AsyncIterator[router_pb2_grpc.RouterServiceStub]:
    server = create_server()
    servicer = RouterServicer(OneTenant())
    servicer.serve(cast("Node", node))
    router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    # Windows that do not grow: what a stalled stream may have under way is known.
    options = (("grpc.http2.bdp_probe", 0),)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield router_pb2_grpc.RouterServiceStub(channel)
    await server.stop(0)


def logprobs(index: int) -> TokenLogprobs:
    top = tuple((rank, -float(rank)) for rank in range(NUM_LOGPROBS))
    return TokenLogprobs(TOKENS[index], -float(index), top)


async def begin(stub: router_pb2_grpc.RouterServiceStub) -> grpc.aio.UnaryStreamCall:
    """A call that was accepted."""
    request = pb.GenerateRequest(
        text="x",
        sampling=pb.SamplingParams(num_logprobs=NUM_LOGPROBS),
        stopping=pb.StoppingCriteria(max_tokens=NUM_TOKENS),
    )
    call = stub.Generate(request)
    assert (await call.read()).HasField("accepted")
    return call


async def rest_of(call: grpc.aio.UnaryStreamCall) -> AsyncIterator[pb.GenerateResponse]:
    while (event := await call.read()) is not grpc.aio.EOF:
        yield event


async def both_served() -> tuple[list[OutputDelta], list[pb.Delta]]:
    """What went out token by token to a client that reads, and then the deltas of one that did not."""
    node = HandFedNode()
    async with router(node) as stub, asyncio.timeout(60):
        quick, slow = await begin(stub), await begin(stub)
        token_ids = array("i", node.prompt_token_ids)
        stream = TOKENIZER.stream(token_ids)
        expected = TextOutput(token_ids, stream, (), include_stop_string=False)
        sent = []
        for index, token_id in enumerate(TOKENS):
            for sequence in node.sequences:
                sequence.append(token_id, logprobs(index))
            token_ids.append(token_id)
            expected.add_logprobs(logprobs(index))
            if (delta := expected.take()) is not None:
                assert (await quick.read()).delta == messages.delta(0, delta).delta
                sent.append(delta)
        assert (await quick.read()).finished.finish_reason == pb.FINISH_REASON_LENGTH
        events = [event async for event in rest_of(slow)]
        assert events.pop().finished.usage.num_output_tokens == NUM_TOKENS
        return sent, [event.delta for event in events]


def test_a_client_that_stops_reading_costs_nobody_anything_and_loses_nothing() -> None:
    """Each token reaches the other client at once; what the connection cannot take waits as one delta, in order."""
    sent, slow = asyncio.run(both_served())
    assert [token for delta in slow for token in delta.token_ids] == TOKENS
    assert "".join(delta.text for delta in slow) == "".join(delta.text for delta in sent)
    assert [found.logprob for delta in slow for found in delta.logprobs] == [
        -float(index) for index in range(NUM_TOKENS)
    ]
    assert len(slow) < len(sent) / 2
    assert max(len(delta.token_ids) for delta in slow) > NUM_TOKENS / 2
