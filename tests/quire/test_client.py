"""The Python client against real services, and against a server that fails."""

from __future__ import annotations

import asyncio
from concurrent import futures
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from processes import assert_pool_is_idle

from protos.router.v1 import router_pb2 as pb
from protos.router.v1 import router_pb2_grpc
from quire.client import AsyncClient, Client, PoolInspector, RemoteError
from quire.errors import InvalidRequest, RequestNotFound, SequenceNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from processes import Quire

TEXT = "import os\n"


def test_generate_iterates_deltas(quire: Quire) -> None:
    """The deltas are the output of `complete`; `accepted` and `finished` tell the rest."""
    with Client(quire.addresses["router"]) as client:
        generation = client.generate(TEXT, temperature=0, max_tokens=20, ignore_eos=True)
        tokens = [token for delta in generation for token in delta.token_ids]
        whole = client.complete(TEXT, temperature=0, max_tokens=20, ignore_eos=True)
    assert tokens == list(whole.completions[0].token_ids)
    assert generation.accepted is not None
    assert generation.finished[0].finish_reason == pb.FINISH_REASON_LENGTH
    assert generation.finished[0].usage.num_output_tokens == 20


def test_the_async_client_gives_the_same(quire: Quire) -> None:
    """`async for` over `AsyncClient.generate` yields what the blocking client does; its other calls work."""

    async def talk() -> tuple[str, str, list[int], str]:
        async with AsyncClient(quire.addresses["router"]) as client:
            generation = client.generate(TEXT, temperature=0, max_tokens=20)
            text = "".join([delta.text async for delta in generation])
            assert generation.finished[0].usage.num_output_tokens > 0
            whole = await client.complete(TEXT, temperature=0, max_tokens=20)
            ids = await client.tokenize(TEXT)
            with pytest.raises(RequestNotFound):
                await client.abort("nobody")
            assert (await client.get_model()).vocab_size == 4096
            return text, whole.completions[0].text, ids, await client.detokenize(ids)

    text, whole, ids, again = asyncio.run(talk())
    assert text == whole
    assert again == TEXT
    with Client(quire.addresses["router"]) as client:
        assert client.tokenize(TEXT) == ids
        assert client.detokenize(ids) == TEXT
        assert client.complete(ids, temperature=0, max_tokens=20).completions[0].text == whole


def test_every_option_reaches_its_field(quire: Quire) -> None:
    """Sampling, stopping, bias, log-probabilities and several samples are taken as keywords."""
    bias = dict.fromkeys(range(300, 310), 50.0)
    with Client(quire.addresses["router"]) as client:
        answer = client.complete(
            [{"role": "user", "content": "hi"}],
            request_id="all-options",
            priority=-1,
            seed=3,
            num_samples=2,
            logit_bias=bias,
            num_logprobs=2,
            max_tokens=5,
            min_tokens=5,
            stop_token_ids=[7],
        )
    assert (answer.request_id, answer.seed, len(answer.completions)) == ("all-options", 3, 2)
    for found in answer.completions:
        assert set(found.token_ids) <= set(bias)
        assert [len(entry.top) for entry in found.logprobs] == [2] * 5


def test_failures_are_quire_errors(quire: Quire) -> None:
    """A refusal is the error that the service raised, a passed deadline a RemoteError, an unknown option a TypeError."""
    with Client(quire.addresses["router"]) as client:
        with pytest.raises(InvalidRequest) as caught:
            list(client.generate(TEXT, top_p=7))
        assert caught.value.violations[0].field == "sampling.top_p"
        with pytest.raises(RemoteError) as late:
            client.complete(TEXT, max_tokens=900, ignore_eos=True, timeout_s=0.2)
        assert late.value.status_code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert late.value.code == "DEADLINE_EXCEEDED"
        with pytest.raises(TypeError, match="did you mean 'temperature'"):
            client.generate(TEXT, temprature=1)  # type: ignore[call-arg]
    assert_pool_is_idle(quire)


def test_a_generation_that_is_left_gives_its_blocks_back(quire: Quire) -> None:
    """Leaving the `with` block of a generation ends the request."""
    with Client(quire.addresses["router"]) as client:
        with client.generate(TEXT, max_tokens=900, ignore_eos=True) as generation:
            next(generation)
        assert_pool_is_idle(quire)


def test_the_pool_can_be_looked_into(quire: Quire) -> None:
    """A running request is listed, and its table holds referenced blocks."""
    with (
        Client(quire.addresses["router"]) as client,
        PoolInspector(quire.addresses["memory"]) as inspector,
        client.generate(TEXT, max_tokens=900, ignore_eos=True, request_id="seen") as generation,
    ):
        next(generation)
        assert [found.request_id for found in inspector.list_sequences()] == ["seen"]
        found = inspector.get_sequence("seen/0")
        assert all(entry.ref_count == 1 for entry in found.block_table)
        assert inspector.get_pool().num_used_blocks > 0
        assert inspector.check_integrity() == []
        with pytest.raises(SequenceNotFound):
            inspector.get_sequence("nobody")
    assert_pool_is_idle(quire)


class AwayForAWhile(router_pb2_grpc.RouterServiceServicer):
    """Answers UNAVAILABLE twice, then well."""

    def __init__(self) -> None:
        self.calls = 0

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        self.calls += 1
        if self.calls <= 2:
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        yield pb.GenerateResponse(delta=pb.Delta(text="here"))


def test_a_router_that_is_away_is_asked_again() -> None:
    """UNAVAILABLE before anything was answered is repeated by the channel."""
    servicer = AwayForAWhile()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}") as client:
            assert [delta.text for delta in client.generate("x", timeout_s=20)] == ["here"]
    finally:
        server.stop(None)
    assert servicer.calls == 3
