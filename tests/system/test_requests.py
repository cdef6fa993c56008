"""What clients see: errors, aborts, seeds; and what the pool looks like afterwards."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest
from processes import Quire, assert_pool_is_idle

from protos.memory.v1 import inspection_pb2
from protos.router.v1 import router_pb2 as pb
from quire.rpc_status import from_rpc_error

if TYPE_CHECKING:
    from quire.errors import QuireError


def request(text: str = "import os", num_tokens: int = 16, **sampling: float) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text=text,
        sampling=pb.SamplingParams(**sampling),
        stopping=pb.StoppingCriteria(max_tokens=num_tokens, ignore_eos=True),
    )


def complete(quire: Quire, message: pb.GenerateRequest) -> pb.CompleteResponse:
    return quire.router.Complete(pb.CompleteRequest(request=message), timeout=60)


def error_of(quire: Quire, message: pb.GenerateRequest) -> QuireError:
    with pytest.raises(grpc.RpcError) as caught:
        complete(quire, message)
    return from_rpc_error(caught.value)


@pytest.mark.parametrize(
    ("message", "code", "reason", "field"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "INVALID_REQUEST", "prompt"),
        (pb.GenerateRequest(text=""), "INVALID_ARGUMENT", "INVALID_REQUEST", "text"),
        (
            pb.GenerateRequest(tokens=pb.TokenIds(ids=[4096])),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
            "tokens.ids[0]",
        ),
        (request(temperature=-1), "INVALID_ARGUMENT", "INVALID_REQUEST", "sampling.temperature"),
        (request(top_p=0), "INVALID_ARGUMENT", "INVALID_REQUEST", "sampling.top_p"),
        (request(num_samples=0), "INVALID_ARGUMENT", "INVALID_REQUEST", "sampling.num_samples"),
        (
            pb.GenerateRequest(text="x", stopping=pb.StoppingCriteria(max_tokens=2, min_tokens=3)),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
            "stopping.min_tokens",
        ),
        (
            pb.GenerateRequest(text="x", stopping=pb.StoppingCriteria(include_stop_string=True)),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
            "stopping.include_stop_string",
        ),
        (
            pb.GenerateRequest(text="x", stopping=pb.StoppingCriteria(stop_strings=["a", ""])),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
            "stopping.stop_strings",
        ),
        (request(top_k=-1), "INVALID_ARGUMENT", "INVALID_REQUEST", "sampling.top_k"),
        (request(min_p=1.5), "INVALID_ARGUMENT", "INVALID_REQUEST", "sampling.min_p"),
        (
            request(temperature=float("nan")),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
            "sampling.temperature",
        ),
        (request(num_logprobs=21), "INVALID_ARGUMENT", "INVALID_REQUEST", "sampling.num_logprobs"),
        (
            pb.GenerateRequest(
                text="x",
                sampling=pb.SamplingParams(logit_bias=[pb.LogitBias(token_id=4096, bias=1)]),
            ),
            "INVALID_ARGUMENT",
            "INVALID_REQUEST",
            "sampling.logit_bias[0].token_id",
        ),
        (request("x " * 3000), "INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED", "text"),
    ],
)
def test_a_wrong_request_gets_a_precise_error(
    quire: Quire, message: pb.GenerateRequest, code: str, reason: str, field: str
) -> None:
    """Code, reason and the offending field; nothing is left in the pool."""
    error = error_of(quire, message)
    assert (error.code, error.reason.value) == (code, reason)
    assert [found.field for found in error.violations] == [field]
    assert_pool_is_idle(quire)


def test_an_unknown_id_cannot_be_aborted(quire: Quire) -> None:
    """Abort of nobody is NOT_FOUND."""
    with pytest.raises(grpc.RpcError) as caught:
        quire.router.Abort(pb.AbortRequest(request_id="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_live_id_is_taken_until_abort_frees_it(quire: Quire) -> None:
    """A second request of the same id is ALREADY_EXISTS; Abort ends the first with CANCELLED and the pool is idle."""
    message = request("def f():", 900)
    message.request_id = "mine"
    stream = quire.router.Generate(message, timeout=60)
    assert next(stream).accepted.request_id == "mine"
    assert error_of(quire, message).reason.value == "REQUEST_ID_IN_USE"
    assert quire.inspection.GetSequence(
        inspection_pb2.GetSequenceRequest(sequence_id=_wait_for_sequence(quire))
    ).block_table
    quire.router.Abort(pb.AbortRequest(request_id="mine"))
    *_, last = stream
    assert last.finished.finish_reason == pb.FINISH_REASON_CANCELLED
    assert_pool_is_idle(quire)


def _wait_for_sequence(quire: Quire) -> str:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = quire.inspection.ListSequences(inspection_pb2.ListSequencesRequest()).sequences
        if found:
            return str(found[0].sequence_id)
    raise AssertionError("no sequence appeared")


def test_cancelled_and_late_calls_give_their_blocks_back(quire: Quire) -> None:
    """A client that goes away or whose deadline passes loses its request, not the pool's blocks."""
    streams = [quire.router.Generate(request("class A:", 900), timeout=60) for _ in range(4)]
    for stream in streams:
        next(stream)
        stream.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        list(quire.router.Generate(request("class B:", 900), timeout=0.3))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert_pool_is_idle(quire)


def test_a_seed_gives_the_same_output_alone_and_in_a_crowd(quire: Quire) -> None:
    """Neighbours, batches and preemption in a small pool do not change what a seed gives."""
    seeds = range(8)
    messages = [request("import sys\n", 40, seed=seed, temperature=1, top_p=0.9) for seed in seeds]
    alone = [list(complete(quire, message).completions[0].token_ids) for message in messages]
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(lambda message: complete(quire, message), messages))
    # Weights are bfloat16, where another batch may round otherwise: most, not all, must agree to the end.
    agreeing = [a == list(b.completions[0].token_ids) for a, b in zip(alone, crowd, strict=True)]
    assert len({tuple(found) for found in alone}) == len(seeds)
    assert sum(agreeing) >= len(seeds) - 2


def test_a_stop_string_across_tokens_ends_the_text_before_it(quire: Quire) -> None:
    """The text ends where the stop string begins, wherever token borders lie."""
    message = request("import os", 60, temperature=0)
    text = complete(quire, message).completions[0].text
    stop = text[10:16]
    message.stopping.stop_strings.append(stop)
    found = complete(quire, message).completions[0]
    assert found.text == text[: text.index(stop)]
    assert found.finished.finish_reason == pb.FINISH_REASON_STOP
    assert found.finished.stop_string == stop


def test_text_round_trips_through_tokenize_and_detokenize(quire: Quire) -> None:
    """Detokenize undoes Tokenize."""
    text = "def f(x):\n    return 'ä'\n"
    ids = quire.router.Tokenize(pb.TokenizeRequest(text=text)).token_ids
    assert quire.router.Detokenize(pb.DetokenizeRequest(token_ids=ids)).text == text


def test_the_model_is_described(quire: Quire) -> None:
    """GetModel names architecture and limits."""
    model = quire.router.GetModel(pb.GetModelRequest())
    assert (model.architecture, model.max_model_len, model.vocab_size) == (
        "LlamaForCausalLM",
        1024,
        4096,
    )


def test_a_conversation_is_rendered_by_the_chat_template(quire: Quire) -> None:
    """The prompt of a conversation is what the template makes of it."""
    conversation = pb.Conversation(messages=[pb.Message(role="user", content="hi")])
    ids = quire.router.Tokenize(pb.TokenizeRequest(conversation=conversation)).token_ids
    text = quire.router.Detokenize(pb.DetokenizeRequest(token_ids=ids)).text
    assert text == "# user: hi\n# assistant:"


def test_generated_tokens_are_cached_too(quire: Quire) -> None:
    """A prompt that repeats an earlier one with its output hits every full block of both."""
    message = request("class Cached(object):\n    '''What was", 60, temperature=0)
    prompt = list(quire.router.Tokenize(pb.TokenizeRequest(text=message.text)).token_ids)
    output = list(complete(quire, message).completions[0].token_ids)
    again = pb.GenerateRequest(
        tokens=pb.TokenIds(ids=prompt + output), stopping=pb.StoppingCriteria(max_tokens=1)
    )
    usage = complete(quire, again).completions[0].finished.usage
    # The last token was sampled, but never run.
    num_computed = len(prompt) + len(output) - 1
    assert usage.num_cached_tokens == num_computed // 16 * 16 > len(prompt)


def test_logprobs_come_with_their_tokens(quire: Quire) -> None:
    """Each token has its own log-probability and as many of the likeliest as were asked for, highest first."""
    found = complete(quire, request("import os", 12, temperature=0, num_logprobs=3)).completions[0]
    assert len(found.logprobs) == len(found.token_ids) == 12
    for token_id, logprobs in zip(found.token_ids, found.logprobs, strict=True):
        assert logprobs.token_id == token_id == logprobs.top[0].token_id
        values = [top.logprob for top in logprobs.top]
        assert values == sorted(values, reverse=True)
        assert len(values) == 3
        assert logprobs.logprob == values[0] < 0
