"""Bidirectional streams, spoken one message at a time."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import grpc

from quire.rpc_status import from_rpc_error


class Stream:
    """One side of a bidirectional call: a message out, a message in."""

    def __init__(self, call: Any) -> None:
        self._outgoing: SimpleQueue[Any] = SimpleQueue()
        self._incoming = call(iter(self._outgoing.get, None))

    def ask(self, message: Any) -> Any:
        """Send, and wait for the answer; raises the error that ends the stream."""
        self.send(message)
        return self.receive()

    def send(self, message: Any) -> None:
        """Send, and do not wait."""
        self._outgoing.put(message)

    def receive(self) -> Any:
        """The next answer; raises the error that ends the stream."""
        try:
            return next(self._incoming)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def close(self, *last: Any) -> None:
        """Send `last`, half-close, and wait until the other side has ended too."""
        for message in (*last, None):
            self._outgoing.put(message)
        assert list(self._incoming) == []

    def cancel(self) -> None:
        """Break off, as a killed process does."""
        self._incoming.cancel()
