"""Random and hostile messages on every stream and call of the memory service: it answers, never dies, never leaks."""

from __future__ import annotations

import os
import random
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from processes import running_service, wait_until_serving
from streams import Stream

from protos.memory.v1 import (
    control_pb2,
    inspection_pb2,
    inspection_pb2_grpc,
    memory_pb2,
    memory_pb2_grpc,
    pool_pb2,
    pool_pb2_grpc,
)
from quire.descriptor import fetch_descriptor
from quire.errors import QuireError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from google.protobuf.descriptor import Descriptor, MethodDescriptor, ServiceDescriptor
    from google.protobuf.message import Message

NUM_STREAMS = int(os.environ.get("QUIRE_TEST_EXAMPLES", "150"))
NUM_CALLS = 4 * NUM_STREAMS
LEASE_S = 0.3
# What a caller may be told. INTERNAL would be a defect of ours, UNKNOWN an exception that nobody named.
POLITE = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
}
NUMBERS = (0, 1, 2, 3, 7, 15, 16, 17, 100, -1, -(2**31), 2**31 - 1)
IDENTITY = pool_pb2.PoolIdentity(
    layers=[pool_pb2.KvLayer(num_kv_heads=1, k_head_dim=64, v_head_dim=64)],
    dtype="float32",
    block_size=16,
    tensor_parallel_size=1,
    model_fingerprint="hostile",
)


class Service:
    """A memory service with a writer, and what it logged."""

    def __init__(self, channel: grpc.Channel, attached: pool_pb2.AttachPoolResponse) -> None:
        self.channel = channel
        self.attached = attached
        self.inspection = inspection_pb2_grpc.InspectionServiceStub(channel)

    def assert_sound(self) -> None:
        """Alive, its books agree, and nothing is left of sessions that are over."""
        time.sleep(2 * LEASE_S)
        deadline = time.monotonic() + 20
        while True:
            pool = self.inspection.GetPool(inspection_pb2.GetPoolRequest(), timeout=10)
            if not pool.num_used_blocks and not pool.num_sessions:
                break
            assert time.monotonic() < deadline, pool
            time.sleep(0.1)
        checked = self.inspection.CheckIntegrity(inspection_pb2.CheckIntegrityRequest(), timeout=10)
        assert list(checked.findings) == []


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder: Path = tmp_path_factory.mktemp("memory")
    address = f"unix:{folder}/memory.sock"
    flags = (
        *("--listen", address, "--descriptor-socket", f"{folder}/d.sock"),
        *("--memory-budget", "400KiB", "--lease-ttl-s", str(LEASE_S), "--max-num-rows", "64"),
    )
    with (
        running_service("memory", *flags) as process,
        grpc.insecure_channel(address) as channel,
    ):
        wait_until_serving(channel)
        request = pool_pb2.AttachPoolRequest(identity=IDENTITY, max_model_len=256)
        attached = pool_pb2_grpc.PoolServiceStub(channel).AttachPool(request)
        descriptor = fetch_descriptor(attached.descriptor_socket, attached.ticket)
        yield Service(channel, attached)
        descriptor.close()
        assert process.poll() is None


class Chance:
    """Random messages: of each field mostly what makes sense, sometimes what does not."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 -- of tests

    def message(self, descriptor: Descriptor) -> Message:
        """A message with some of its fields set."""
        found = GetMessageClass(descriptor)()
        for field in descriptor.fields:
            if self.random.random() < 0.6:
                self._set(found, field)
        return found

    def _set(self, message: Message, field: FieldDescriptor) -> None:
        if field.is_repeated:
            values = [self._value(field) for _ in range(self.random.choice((0, 1, 1, 2, 5, 40)))]
            getattr(message, field.name).extend(values)
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(self._value(field))
        else:
            setattr(message, field.name, self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        if field.message_type is not None:
            return self.message(field.message_type)
        if field.enum_type is not None:
            return self.random.choice((0, 1, 2, 99))
        return self._scalar(field.type)

    def _scalar(self, kind: int) -> Any:
        if kind == FieldDescriptor.TYPE_BYTES:
            return self.random.randbytes(self.random.choice((0, 3, 4, 16, 64, 128, 4096)))
        if kind == FieldDescriptor.TYPE_STRING:
            return self.random.choice(("", "a", "s/0", "ü" * 50, "x" * 500, "r-1", "p-1"))
        if kind == FieldDescriptor.TYPE_BOOL:
            return self.random.random() < 0.5
        if kind in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
            return self.random.choice((0.0, -1.0, 1e300, float("nan"), float("inf")))
        return self.random.choice(NUMBERS)

    def step(self, generation: int, step: int, live: list[int]) -> memory_pb2.SessionRequest:
        """Mostly a step that can be applied, which releases the `live` rows and admits others."""
        drawn = self.message(memory_pb2.AllocateStep.DESCRIPTOR)
        assert isinstance(drawn, memory_pb2.AllocateStep)
        drawn.generation, drawn.step = generation, step
        drawn.acknowledged_step = max(0, step - 1)
        if self.random.random() < 0.9:
            for name in ("commit_rows", "release_rows", "extend_rows"):
                drawn.ClearField(name)
            for name in ("commit_num_computed_tokens", "extend_starts", "extend_num_tokens"):
                drawn.ClearField(name)
            for name in ("commit_token_ids", "forks", "release_reasons"):
                drawn.ClearField(name)
            drawn.release_rows.extend(live)
            drawn.watermark_blocks, drawn.admit_token_budget = 0, 500
            for row, admit in enumerate(drawn.admits):
                admit.row, admit.num_sequences = row, 1
                admit.tenant = admit.tenant[:20]
                admit.token_ids = b"\1\0\0\0" * self.random.randrange(1, 60)
            del drawn.admits[8:]
        return memory_pb2.SessionRequest(step=drawn)


def hello_of(service: Service, session_id: str) -> memory_pb2.SessionRequest:
    hello = memory_pb2.SessionHello(
        session_id=session_id,
        pool_id=service.attached.pool_id,
        writer_generation=service.attached.writer_generation,
        max_num_rows=8,
    )
    return memory_pb2.SessionRequest(hello=hello)


def misbehave(service: Service, seed: int) -> QuireError | None:
    """One session that goes wrong sooner or later; the error that ended it, None when it was broken off from here."""
    chance = Chance(seed)
    stream = Stream(memory_pb2_grpc.MemoryServiceStub(service.channel).Session)
    try:
        if chance.random.random() < 0.1:
            stream.ask(chance.message(memory_pb2.SessionRequest.DESCRIPTOR))
        welcome = stream.ask(hello_of(service, f"hostile-{seed % 7}")).welcome
        live = [found.row for found in welcome.sequences]
        for step in range(welcome.last_applied_step + 1, welcome.last_applied_step + 12):
            answer = stream.ask(chance.step(welcome.generation, step, live)).answer
            live = [found.row for found in answer.admissions]
        if chance.random.random() < 0.5:
            stream.ask(chance.message(memory_pb2.SessionRequest.DESCRIPTOR))
    except QuireError as error:
        return error
    except StopIteration:  # a goodbye was among the random messages
        return None
    stream.cancel()
    return None


def test_sessions_survive_hostile_routers(service: Service) -> None:
    """Every stream ends politely or is broken off; some steps were applied, some refused, and nothing is left."""
    endings = [misbehave(service, seed) for seed in range(NUM_STREAMS)]
    codes = {error.code for error in endings if error is not None}
    assert codes <= {code.name for code in POLITE}, codes
    assert "FAILED_PRECONDITION" in codes
    assert None in endings
    pool = service.inspection.GetPool(inspection_pb2.GetPoolRequest())
    assert int(pool.num_prefix_query_tokens) > 0
    service.assert_sound()


def methods(service: ServiceDescriptor) -> list[MethodDescriptor]:
    return [found for found in service.methods if not found.client_streaming]


CALLS = [
    found
    for file in (inspection_pb2, control_pb2, pool_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for found in methods(service)
]


@pytest.mark.parametrize("method", CALLS, ids=lambda method: method.name)
def test_calls_survive_hostile_callers(service: Service, method: MethodDescriptor) -> None:
    """Random requests, with a session of somebody else beside them: an answer or a polite refusal to each."""
    chance = Chance(1)
    neighbour = Stream(memory_pb2_grpc.MemoryServiceStub(service.channel).Session)
    generation = neighbour.ask(hello_of(service, f"neighbour-{method.name}")).welcome.generation
    admit = memory_pb2.AdmitDemand(
        row=0, sequence_id="s/0", token_ids=b"\1\0\0\0" * 40, num_sequences=1
    )
    step = memory_pb2.AllocateStep(
        generation=generation, step=1, admits=[admit], admit_token_budget=99
    )
    assert neighbour.ask(memory_pb2.SessionRequest(step=step)).answer.admissions
    for _ in range(NUM_CALLS // len(CALLS)):
        request = chance.message(method.input_type)
        assert outcome(call(service.channel, method), request) in POLITE, request
    neighbour.cancel()
    service.assert_sound()


def outcome(answer: Callable[[Message], None], request: Message) -> grpc.StatusCode:
    try:
        answer(request)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def call(channel: grpc.Channel, method: MethodDescriptor) -> Callable[[Message], None]:
    """Calls `method` and reads at most some answers."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    codec = {
        "request_serializer": method.input_type._concrete_class.SerializeToString,
        "response_deserializer": method.output_type._concrete_class.FromString,
    }
    if not method.server_streaming:
        unary = channel.unary_unary(path, **codec)
        return lambda request: unary(request, timeout=10)

    def read_some(request: Message) -> None:
        stream = channel.unary_stream(path, **codec)(request, timeout=10)
        next(stream)
        stream.cancel()

    return read_some


def test_bytes_that_are_no_message(service: Service) -> None:
    """What cannot be parsed ends its own call and nothing else."""
    chance = random.Random(2)  # noqa: S311 -- of tests
    raw = service.channel.stream_stream(
        "/quire.memory.v1.MemoryService/Session",
        request_serializer=bytes,
        response_deserializer=bytes,
    )
    for _ in range(20):
        with pytest.raises(grpc.RpcError):
            list(raw(iter([chance.randbytes(50)]), timeout=10))
    service.assert_sound()
