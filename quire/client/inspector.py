"""Looking into the memory service from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, TypeAlias

import grpc

from protos.memory.v1 import inspection_pb2 as pb
from protos.memory.v1 import inspection_pb2_grpc
from quire.client.channel import OPTIONS, SHORT_TIMEOUT_S
from quire.client.sync import raising_quire_errors

if TYPE_CHECKING:
    from collections.abc import Iterator


Pool: TypeAlias = pb.GetPoolResponse


class PoolInspector:
    """A connection to the memory service's read-only inspection.

    Args:
        address: "host:port" or "unix:/path" of the memory service.
        timeout_s: deadline in seconds of each call.
    """

    def __init__(self, address: str, *, timeout_s: float = SHORT_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._stub = inspection_pb2_grpc.InspectionServiceStub(self._channel)

    def get_pool(self) -> Pool:
        """Counts of blocks; raises NoPool before a compute service attached."""
        with raising_quire_errors():
            return self._stub.GetPool(pb.GetPoolRequest(), timeout=self._timeout_s)

    def list_sequences(self) -> Iterator[pb.Sequence]:
        """All live sequences, page by page."""
        token = ""
        while True:
            request = pb.ListSequencesRequest(page_size=1000, page_token=token)
            with raising_quire_errors():
                page = self._stub.ListSequences(request, timeout=self._timeout_s)
            yield from page.sequences
            token = page.next_page_token
            if not token:
                return

    def get_sequence(self, sequence_id: str) -> pb.GetSequenceResponse:
        """One sequence with its block table; raises SequenceNotFound."""
        request = pb.GetSequenceRequest(sequence_id=sequence_id)
        with raising_quire_errors():
            return self._stub.GetSequence(request, timeout=self._timeout_s)

    def check_integrity(self) -> list[str]:
        """What does not agree in the pool's books; empty when all is well."""
        with raising_quire_errors():
            answer = self._stub.CheckIntegrity(pb.CheckIntegrityRequest(), timeout=self._timeout_s)
        return list(answer.findings)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
