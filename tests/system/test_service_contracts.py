"""Every RPC of the memory and the compute service, called as the other services call them, on real servers."""

from __future__ import annotations

import signal
import time
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest
import torch
from processes import running_service, wait_until_serving
from streams import Stream
from tiny_checkpoints import VOCAB_SIZE, make_checkpoint
from transformers import AutoModelForCausalLM

from protos.common.v1 import block_pb2
from protos.compute.v1 import compute_pb2, compute_pb2_grpc
from protos.memory.v1 import (
    inspection_pb2,
    inspection_pb2_grpc,
    memory_pb2,
    memory_pb2_grpc,
    pool_pb2,
    pool_pb2_grpc,
)
from quire.descriptor import DescriptorRefusedError, fetch_descriptor
from quire.errors import QuireError
from quire.pool_trailer import verify_pool_descriptor
from quire.rpc_status import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 16
PROMPT = [5, 9, 33, 7, 250]
GOODBYE = memory_pb2.SessionRequest(goodbye=memory_pb2.SessionGoodbye())


@dataclass(frozen=True)
class Pair:
    """A memory and a compute service without a router, so that a test can be one."""

    folder: Path
    model_folder: Path
    compute_pid: int
    memory: memory_pb2_grpc.MemoryServiceStub
    pool: pool_pb2_grpc.PoolServiceStub
    inspection: inspection_pb2_grpc.InspectionServiceStub
    compute: compute_pb2_grpc.ComputeServiceStub


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    model = make_checkpoint(folder / "model", "llama")
    memory, compute = f"unix:{folder}/memory.sock", f"unix:{folder}/compute.sock"
    descriptor = ("--descriptor-socket", f"{folder}/descriptor.sock")
    memory_flags = ("--listen", memory, *descriptor, "--memory-budget", "2MiB")
    compute_flags = ("--listen", compute, "--memory-address", memory, "--model", str(model))
    with (
        running_service("memory", *memory_flags, "--lease-ttl-s", "0.5"),
        running_service("compute", *compute_flags) as process,
        grpc.insecure_channel(memory) as to_memory,
        grpc.insecure_channel(compute) as to_compute,
    ):
        wait_until_serving(to_compute)
        yield Pair(
            folder,
            model,
            process.pid,
            memory_pb2_grpc.MemoryServiceStub(to_memory),
            pool_pb2_grpc.PoolServiceStub(to_memory),
            inspection_pb2_grpc.InspectionServiceStub(to_memory),
            compute_pb2_grpc.ComputeServiceStub(to_compute),
        )


def ids(values: list[int]) -> bytes:
    return array("i", values).tobytes()


def table(packed: bytes) -> list[int]:
    return list(array("i", packed))


def hello(pair: Pair, session_id: str, **changes: Any) -> memory_pb2.SessionRequest:
    model = pair.compute.GetModel(compute_pb2.GetModelRequest())
    fields = {
        "session_id": session_id,
        "pool_id": model.pool_id,
        "writer_generation": model.writer_generation,
        "max_num_rows": 4,
        **changes,
    }
    return memory_pb2.SessionRequest(hello=memory_pb2.SessionHello(**fields))


def allocate(generation: int, step: int, **fields: Any) -> memory_pb2.SessionRequest:
    message = memory_pb2.AllocateStep(generation=generation, step=step, **fields)
    return memory_pb2.SessionRequest(step=message)


def admission(row: int = 0, token_ids: list[int] = PROMPT) -> memory_pb2.AdmitDemand:
    return memory_pb2.AdmitDemand(
        row=row,
        incarnation=1,
        sequence_id=f"s{row}",
        request_id="r",
        token_ids=ids(token_ids),
        num_sequences=1,
    )


def num_used(pair: Pair) -> int:
    return int(pair.inspection.GetPool(inspection_pb2.GetPoolRequest()).num_used_blocks)


def greedy() -> compute_pb2.SamplingSettings:
    return compute_pb2.SamplingSettings(
        temperature=0, top_p=1, repetition_penalty=1, num_logprobs=-1
    )


def test_a_session_runs_a_request_through_both_services(pair: Pair) -> None:
    """Admit, execute, extend, commit, release: the tokens are those of transformers, the pool ends as it began."""
    session, steps = Stream(pair.memory.Session), Stream(pair.compute.Execute)
    welcome = session.ask(hello(pair, "whole")).welcome
    generation = welcome.generation
    pool_id = pair.compute.GetModel(compute_pb2.GetModelRequest()).pool_id
    opening = compute_pb2.ExecuteHello(session_id="whole", generation=generation, pool_id=pool_id)
    epoch = steps.ask(compute_pb2.ExecuteRequest(hello=opening)).welcome.epoch
    answer = session.ask(
        allocate(generation, 1, admits=[admission()], admit_token_budget=99)
    ).answer
    (found,) = answer.admissions
    assert (found.num_cached_tokens, found.num_scheduled_tokens) == (0, len(PROMPT))
    new_row = compute_pb2.RowState(
        row=0,
        incarnation=1,
        block_table=found.block_table,
        token_ids=ids(PROMPT),
        num_prompt_tokens=len(PROMPT),
        sampling=greedy(),
    )
    output = run_step(steps, generation, 1, epoch, 0, len(PROMPT), reset=True, new_rows=[new_row])
    tokens = [output]
    for step in range(2, 5):
        start = len(PROMPT) + step - 2
        progress = {
            "commit_rows": [0],
            "commit_num_computed_tokens": [start],
            "acknowledged_step": step - 1,
            "extend_rows": [0],
            "extend_starts": [start],
            "extend_num_tokens": [1],
        }
        session.ask(allocate(generation, step, **progress))
        # The token itself was never sent: the step before left it with the row.
        tokens.append(run_step(steps, generation, step, epoch, start, 1))
    oracle = AutoModelForCausalLM.from_pretrained(pair.model_folder, attn_implementation="eager")
    expected = oracle.generate(torch.tensor([PROMPT]), max_new_tokens=4, do_sample=False)
    assert tokens == expected[0, len(PROMPT) :].tolist()
    session.ask(allocate(generation, 9, release_rows=[0]))
    assert num_used(pair) == 0
    steps.close()
    session.close(GOODBYE)


def run_step(
    steps: Stream, generation: int, step: int, epoch: int, start: int, count: int, **fields: Any
) -> int:
    message = compute_pb2.ExecuteStep(
        generation=generation,
        step=step,
        epoch=epoch,
        rows=[0],
        starts=[start],
        num_tokens=[count],
        output_rows=[0],
        output_samples=[0],
        **fields,
    )
    result = steps.ask(compute_pb2.ExecuteRequest(step=message)).result
    assert (result.step, list(result.incarnations)) == (step, [1])
    return int(result.token_ids[0])


def test_a_resumed_session_is_told_what_it_holds(pair: Pair) -> None:
    """A stream that ends without goodbye keeps its sequences for the lease; the next gets their tables."""
    first = Stream(pair.memory.Session)
    generation = first.ask(hello(pair, "resumed")).welcome.generation
    step = allocate(generation, 7, admits=[admission(2)], admit_token_budget=99)
    given = first.ask(step).answer.admissions[0]
    first.close()
    second = Stream(pair.memory.Session)
    welcome = second.ask(hello(pair, "resumed")).welcome
    assert welcome.generation > generation
    assert welcome.last_applied_step == 7
    (held,) = welcome.sequences
    assert (held.row, held.sequence_id, held.incarnation) == (2, "s2", 1)
    assert table(held.block_table) == table(given.block_table)
    second.close(GOODBYE)
    assert num_used(pair) == 0


def test_a_lapsed_session_gives_everything_back(pair: Pair) -> None:
    """After the lease nothing is left of a session whose stream broke."""
    stream = Stream(pair.memory.Session)
    generation = stream.ask(hello(pair, "lapsed")).welcome.generation
    stream.ask(allocate(generation, 1, admits=[admission()], admit_token_budget=99))
    assert num_used(pair) == 1
    stream.cancel()
    wait_for(lambda: num_used(pair) == 0)


def wait_for(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def error_of(stream: Stream, *messages: Any) -> QuireError:
    for message in messages[:-1]:
        stream.ask(message)
    with pytest.raises(QuireError) as caught:
        stream.ask(messages[-1])
    return caught.value


def test_memory_ends_a_stream_that_breaks_the_contract(pair: Pair) -> None:
    """A wrong first message, an unknown pool, an old generation, a repeated step, an unknown row: each has its reason."""
    new = lambda: Stream(pair.memory.Session)  # noqa: E731 -- one word for what every line does
    assert error_of(new(), allocate(1, 1)).reason == "BROKEN_CONTRACT"
    assert error_of(new(), hello(pair, "x", pool_id="other")).reason == "POOL_MISMATCH"
    assert error_of(new(), hello(pair, "x", writer_generation=99)).reason == "POOL_MISMATCH"
    assert error_of(new(), hello(pair, "")).reason == "INVALID_REQUEST"
    assert error_of(new(), hello(pair, "x", max_num_rows=10**6)).reason == "TOO_MANY_SEQUENCES"
    stream = new()
    generation = stream.ask(hello(pair, "strict")).welcome.generation
    assert error_of(stream, allocate(generation - 1, 1)).reason == "SESSION_FENCED"
    stream = new()
    generation = stream.ask(hello(pair, "strict")).welcome.generation
    stream.ask(allocate(generation, 5))
    assert error_of(stream, allocate(generation, 5)).reason == "BROKEN_CONTRACT"
    stream = new()
    generation = stream.ask(hello(pair, "strict")).welcome.generation
    error = error_of(stream, allocate(generation, 6, release_rows=[3]))
    assert (error.reason, error.metadata) == ("BROKEN_CONTRACT", {"row": "3"})
    wait_for(lambda: num_used(pair) == 0)
    checked = pair.inspection.CheckIntegrity(inspection_pb2.CheckIntegrityRequest())
    assert list(checked.findings) == []


def test_a_newer_stream_fences_the_older_one(pair: Pair) -> None:
    """Two routers that claim one session: the second gets it, the first is told at its next step."""
    first, second = Stream(pair.memory.Session), Stream(pair.memory.Session)
    generation = first.ask(hello(pair, "contested")).welcome.generation
    second.ask(hello(pair, "contested"))
    assert error_of(first, allocate(generation, 1)).reason == "SESSION_FENCED"
    second.close(GOODBYE)


def compute_hello(pair: Pair, generation: int, **changes: Any) -> compute_pb2.ExecuteRequest:
    pool_id = pair.compute.GetModel(compute_pb2.GetModelRequest()).pool_id
    fields = {"session_id": "s", "generation": generation, "pool_id": pool_id, **changes}
    return compute_pb2.ExecuteRequest(hello=compute_pb2.ExecuteHello(**fields))


def execute(step: int, generation: int, epoch: int, **fields: Any) -> compute_pb2.ExecuteRequest:
    message = compute_pb2.ExecuteStep(generation=generation, step=step, epoch=epoch, **fields)
    return compute_pb2.ExecuteRequest(step=message)


def test_compute_asks_for_a_reset_and_changes_its_epoch_after_a_failure(pair: Pair) -> None:
    """A step without reset, of another epoch, or about an unknown row fails; a reset of the new epoch runs."""
    stream = Stream(pair.compute.Execute)
    generation = 10**6
    epoch = stream.ask(compute_hello(pair, generation)).welcome.epoch
    run = {"rows": [0], "starts": [0], "num_tokens": [1], "output_rows": [0], "output_samples": [0]}
    assert stream.ask(execute(1, generation, epoch, **run)).failure.epoch == epoch
    assert stream.ask(execute(2, generation, epoch + 1, reset=True, **run)).failure.epoch == epoch
    failure = stream.ask(execute(3, generation, epoch, reset=True, **run)).failure
    assert failure.message == "row 0 is unknown"
    assert failure.epoch != epoch
    new_row = compute_pb2.RowState(
        incarnation=1,
        block_table=ids([1]),
        token_ids=ids([5]),
        num_prompt_tokens=1,
        sampling=greedy(),
    )
    again = execute(4, generation, failure.epoch, reset=True, new_rows=[new_row], **run)
    assert 0 <= stream.ask(again).result.token_ids[0] < VOCAB_SIZE
    stream.close()


def test_steps_in_flight_feed_each_other_on_the_device(pair: Pair) -> None:
    """Steps sent before the first answers, forks among them, run in order with tokens that nobody has seen yet."""
    stream = Stream(pair.compute.Execute)
    generation = 10**6 + 1
    epoch = stream.ask(compute_hello(pair, generation)).welcome.epoch
    new_row = compute_pb2.RowState(
        incarnation=1,
        block_table=ids([1]),
        token_ids=ids(PROMPT),
        num_prompt_tokens=len(PROMPT),
        sampling=compute_pb2.SamplingSettings(
            temperature=1, top_p=1, repetition_penalty=1, num_logprobs=-1, seed=3
        ),
    )
    fork = compute_pb2.RowFork(
        dst_row=1,
        dst_incarnation=1,
        block_table=ids([2]),
        num_tokens=len(PROMPT),
        source_step=1,
        source_output=1,
    )
    copy = block_pb2.BlockCopy(src_block_id=1, dst_block_id=2)
    count = len(PROMPT)
    first = {"rows": [0], "starts": [0], "num_tokens": [count], "output_rows": [0, 0]}
    second = {"rows": [0, 1], "starts": [count, count], "num_tokens": [1, 1], "output_rows": [0, 1]}
    third = {**second, "starts": [count + 1, count + 1]}
    samples = {"output_samples": [0, 1]}
    stream.send(execute(1, generation, epoch, reset=True, new_rows=[new_row], **first, **samples))
    pending = {"pending_rows": [0], "pending_steps": [1], "pending_outputs": [0]}
    stream.send(
        execute(2, generation, epoch, forks=[fork], copies=[copy], **pending, **second, **samples)
    )
    pending = {"pending_rows": [0, 1], "pending_steps": [2, 2], "pending_outputs": [0, 1]}
    stream.send(execute(3, generation, epoch, **pending, **third, **samples))
    found = [list(stream.receive().result.token_ids) for _ in range(3)]
    # The same, one sample at a time, every token sent by us.
    for sample_index in range(2):
        tokens = [row[sample_index] for row in found]
        for number in range(3):
            known = compute_pb2.RowState(
                incarnation=1,
                block_table=ids([3]),
                token_ids=ids(PROMPT + tokens[:number]),
                num_prompt_tokens=count,
                sampling=new_row.sampling,
            )
            run = {"rows": [0], "starts": [0], "num_tokens": [count + number], "output_rows": [0]}
            step = 10 + 3 * sample_index + number
            alone = execute(
                step,
                generation,
                epoch,
                reset=True,
                new_rows=[known],
                output_samples=[sample_index],
                **run,
            )
            assert list(stream.ask(alone).result.token_ids) == [tokens[number]]
    stream.close()


def test_compute_ends_a_stream_that_breaks_the_contract(pair: Pair) -> None:
    """A wrong first message, another pool, a generation that was overtaken."""
    new = lambda: Stream(pair.compute.Execute)  # noqa: E731 -- one word for what every line does
    generation = 2 * 10**6
    assert error_of(new(), execute(1, 1, 1)).reason == "BROKEN_CONTRACT"
    other = compute_hello(pair, generation, pool_id="other")
    assert error_of(new(), other).reason == "POOL_MISMATCH"
    old = new()
    old.ask(compute_hello(pair, generation))
    newer = new()
    newer.ask(compute_hello(pair, generation + 1))
    assert error_of(old, execute(1, generation, 1)).reason == "SESSION_FENCED"
    assert error_of(new(), compute_hello(pair, generation)).reason == "SESSION_FENCED"
    newer.close()


def test_compute_describes_its_model(pair: Pair) -> None:
    """GetModel says where the model lies, what it is and which pool it writes."""
    model = pair.compute.GetModel(compute_pb2.GetModelRequest())
    assert model.model_folder == str(pair.model_folder)
    assert (model.architecture, model.dtype) == ("LlamaForCausalLM", "float32")
    assert (model.vocab_size, model.max_model_len) == (VOCAB_SIZE, 512)
    assert list(model.eos_token_ids) == [2]
    pool = pair.inspection.GetPool(inspection_pb2.GetPoolRequest())
    assert model.pool_id == pool.pool_id
    assert str(model.writer_generation) == pool.writer_generation


def identity(**changes: Any) -> pool_pb2.PoolIdentity:
    layer = pool_pb2.KvLayer(num_kv_heads=2, k_head_dim=12, v_head_dim=12)
    fields = {
        "layers": [layer],
        "dtype": "float32",
        "block_size": SIZE,
        "tensor_parallel_size": 1,
        "model_fingerprint": "f",
        **changes,
    }
    return pool_pb2.PoolIdentity(**fields)


def test_a_second_writer_is_kept_out_while_the_first_lives(pair: Pair) -> None:
    """AttachPool is refused while the process that fetched the descriptor lives, stopped or not."""
    request = pool_pb2.AttachPoolRequest(identity=identity(), max_model_len=16)
    process = psutil.Process(pair.compute_pid)
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(grpc.RpcError) as caught:
            pair.pool.AttachPool(request)
    finally:
        process.send_signal(signal.SIGCONT)
    assert from_rpc_error(caught.value).reason == "WRITER_ALIVE"


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float128"},
        {"block_size": 12},
        {"layers": []},
        {"layers": [pool_pb2.KvLayer(num_kv_heads=0, k_head_dim=1, v_head_dim=1)]},
    ],
)
def test_an_identity_without_sense_is_refused(pair: Pair, changes: dict[str, Any]) -> None:
    """A pool that cannot be is INVALID_ARGUMENT, before anybody asks who writes."""
    request = pool_pb2.AttachPoolRequest(identity=identity(**changes), max_model_len=16)
    with pytest.raises(grpc.RpcError) as caught:
        pair.pool.AttachPool(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_ticket_opens_the_descriptor_once(tmp_path: Path) -> None:
    """The descriptor comes with the right ticket only, once, and is as large as the pool that was promised."""
    address, path = f"unix:{tmp_path}/m.sock", f"{tmp_path}/d.sock"
    flags = ("--listen", address, "--descriptor-socket", path, "--memory-budget", "1MiB")
    with running_service("memory", *flags), grpc.insecure_channel(address) as channel:
        wait_until_serving(channel)
        stub = pool_pb2_grpc.PoolServiceStub(channel)
        request = pool_pb2.AttachPoolRequest(identity=identity(), max_model_len=64)
        attached = stub.AttachPool(request)
        assert not attached.warm
        assert attached.descriptor_socket == path
        with pytest.raises(DescriptorRefusedError, match="unknown, used or too old"):
            fetch_descriptor(path, "guessed")
        found = fetch_descriptor(path, attached.ticket)
        verify_pool_descriptor(found.fd, attached.size_bytes, attached.pool_id)
        with pytest.raises(DescriptorRefusedError, match="unknown, used or too old"):
            fetch_descriptor(path, attached.ticket)
        found.close()
        # The socket ended, but the process that had it lives on, and it is this one.
        with pytest.raises(grpc.RpcError) as caught:
            stub.AttachPool(request)
        assert from_rpc_error(caught.value).reason == "WRITER_ALIVE"


def test_the_pool_and_its_sequences_can_be_looked_at(pair: Pair) -> None:
    """GetPool, ListSequences in pages, GetSequence with reference counts; what is not there has its reason."""
    stream = Stream(pair.memory.Session)
    generation = stream.ask(hello(pair, "shown")).welcome.generation
    prompt = list(range(40))
    admits = [admission(row, [*prompt, row]) for row in range(3)]
    stream.ask(allocate(generation, 1, admits=admits, admit_token_budget=999))
    commit = {
        "commit_rows": [0],
        "commit_num_computed_tokens": [41],
        "commit_token_ids": ids(prompt[:32]),
    }
    later = allocate(generation, 2, admits=admits[1:], admit_token_budget=999, **commit)
    assert [found.num_cached_tokens for found in stream.ask(later).answer.admissions] == [32, 32]
    pool = pair.inspection.GetPool(inspection_pb2.GetPoolRequest())
    assert (pool.num_sequences, pool.num_used_blocks, pool.num_shared_blocks) == (3, 5, 2)
    total = 1 + pool.num_free_blocks + pool.num_cached_blocks + pool.num_used_blocks
    assert total == pool.num_blocks
    first = pair.inspection.ListSequences(inspection_pb2.ListSequencesRequest(page_size=2))
    assert [found.sequence_id for found in first.sequences] == ["s0", "s1"]
    rest = inspection_pb2.ListSequencesRequest(page_size=2, page_token=first.next_page_token)
    second = pair.inspection.ListSequences(rest)
    assert [found.sequence_id for found in second.sequences] == ["s2"]
    assert not second.next_page_token
    shown = pair.inspection.GetSequence(inspection_pb2.GetSequenceRequest(sequence_id="s1"))
    entries = [(found.ref_count, found.sealed) for found in shown.block_table]
    assert entries == [(3, True), (3, True), (1, False)]
    with pytest.raises(grpc.RpcError) as caught:
        pair.inspection.GetSequence(inspection_pb2.GetSequenceRequest(sequence_id="nobody"))
    assert from_rpc_error(caught.value).reason == "SEQUENCE_NOT_FOUND"
    with pytest.raises(grpc.RpcError) as caught:
        pair.inspection.ListSequences(inspection_pb2.ListSequencesRequest(page_token="x"))  # noqa: S106
    assert from_rpc_error(caught.value).reason == "INVALID_REQUEST"
    stream.close(GOODBYE)
    assert num_used(pair) == 0
