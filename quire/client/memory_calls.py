"""What every connection to the memory service has: a channel, a deadline, the tenant of a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, TypeAlias, TypeVar

import grpc

from quire.client.channel import OPTIONS, SHORT_TIMEOUT_S
from quire.client.sync import raising_quire_errors
from quire.errors import FieldViolation, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

TENANT_KEY = "quire-tenant"
# A watch may be quiet for hours; a machine that vanished without a word must be noticed all the same.
_KEEPALIVE = (("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_timeout_ms", 5_000))

RequestT = TypeVar("RequestT")
AnswerT = TypeVar("AnswerT")
TokenIds: TypeAlias = "Sequence[int]"


class MemoryConnection:
    """A connection to the memory service, for any number of threads.

    Args:
        address: "host:port" or "unix:/path" of the memory service.
        timeout_s: deadline in seconds of each call.
    """

    def __init__(self, address: str, *, timeout_s: float = SHORT_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(address, options=(*OPTIONS, *_KEEPALIVE))

    def _ask(
        self,
        method: grpc.UnaryUnaryMultiCallable[RequestT, AnswerT],
        request: RequestT,
        tenant: str | None = None,
        *,
        timeout_s: float | None = None,
    ) -> AnswerT:
        metadata, timeout = metadata_of(tenant), timeout_s or self._timeout_s
        with raising_quire_errors():
            return method(request, timeout=timeout, metadata=metadata)

    def close(self) -> None:
        """Close the connection; calls that run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def metadata_of(tenant: str | None) -> tuple[tuple[str, str], ...]:
    """Call metadata that names `tenant`; none for None.

    Raises:
        InvalidRequest: metadata cannot carry such a name.
    """
    if tenant is None:
        return ()
    if not (tenant.isascii() and tenant.isprintable()):
        raise InvalidRequest.of([FieldViolation("tenant", "must be printable ASCII")])
    return ((TENANT_KEY, tenant),)
