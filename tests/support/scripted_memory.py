"""A server with the memory service's inspection and control, whose answers are those that a test put down."""

from __future__ import annotations

import queue
from concurrent import futures
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import message_factory

from protos.memory.v1 import control_pb2, inspection_pb2
from quire.errors import QuireError
from quire.rpc_status import to_status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

_SERVICES = (
    inspection_pb2.DESCRIPTOR.services_by_name["InspectionService"],
    control_pb2.DESCRIPTOR.services_by_name["ControlService"],
)


class ScriptedMemory:
    """What is answered, by method, and what was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Message | QuireError]] = {}  # the last one is given again
        self.calls: list[tuple[str, Any, dict[str, str]]] = []  # method, request, metadata
        self._num_watches = 0
        self.changes: queue.Queue[Message | QuireError] = queue.Queue()  # what a Watch sends

    def asked(self, method: str) -> list[tuple[Any, dict[str, str]]]:
        """Requests and metadata of the calls of one method."""
        return [(request, metadata) for name, request, metadata in self.calls if name == method]

    def _note(self, method: str, request: Message, context: grpc.ServicerContext) -> None:
        metadata = {
            str(key): str(value)
            for key, value in context.invocation_metadata()
            if str(key).startswith("quire-")
        }
        self.calls.append((method, request, metadata))

    def _answer(self, method: str, request: Message, context: grpc.ServicerContext) -> Message:
        self._note(method, request, context)
        answers = self.answers[method]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return _or_abort(found, context)

    def _next_change(self, context: grpc.ServicerContext) -> Message | QuireError | None:
        """The next change for a watch that is still read; None once it is not, or another one began."""
        number = self._num_watches
        while context.is_active() and number == self._num_watches:
            try:
                return self.changes.get(timeout=0.02)
            except queue.Empty:
                continue
        return None

    def _watch(
        self, method: str, request: Message, context: grpc.ServicerContext
    ) -> Iterator[Message]:
        self._num_watches += 1
        self._note(method, request, context)
        context.send_initial_metadata(())
        while (found := self._next_change(context)) is not None:
            yield _or_abort(found, context)

    def handler(self, method: Any) -> grpc.RpcMethodHandler:
        """How gRPC calls `method`, a descriptor."""
        request_class = message_factory.GetMessageClass(method.input_type)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(
                lambda request, context: self._watch(method.name, request, context),
                request_deserializer=request_class.FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._answer(method.name, request, context),
            request_deserializer=request_class.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )


def _or_abort(found: Message | QuireError, context: grpc.ServicerContext) -> Message:
    if isinstance(found, QuireError):
        context.abort_with_status(to_status(found))
    return found


@contextmanager
def serving(memory: ScriptedMemory, address: str) -> Iterator[None]:
    """Answer at `address`, a Unix socket so that it can be taken again at once, until the end of the block."""
    # The service allows a client to ask every five seconds whether it is alive.
    options = (("grpc.http2.min_ping_interval_without_data_ms", 5_000),)
    server = grpc.server(futures.ThreadPoolExecutor(8), options=options)
    for service in _SERVICES:
        handlers = {method.name: memory.handler(method) for method in service.methods}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service.full_name, handlers),)
        )
    server.add_insecure_port(address)
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()
