"""The blocking client."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Self, Unpack

import grpc

from protos.router.v1 import router_pb2 as pb
from protos.router.v1 import router_pb2_grpc
from quire.client.channel import DEFAULT_TIMEOUT_S, OPTIONS, SHORT_TIMEOUT_S
from quire.client.credentials import call_metadata
from quire.client.progress import GenerationProgress
from quire.client.requests import GenerateOptions, Prompt, generate_request, set_prompt
from quire.rpc_status import from_rpc_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quire.client.credentials import Metadata


@contextmanager
def raising_quire_errors() -> Iterator[None]:
    """Raise the QuireError that a failed call stands for."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


class Generation(GenerationProgress):
    """Iterates the deltas of a request; ends when every sample finished.

    `cancel()`, the end of a `with` block and of the last reference end the request, and its blocks return to the pool.
    """

    def __init__(self, call: grpc._CallIterator[pb.GenerateResponse]) -> None:
        super().__init__()
        self._call = call

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> pb.Delta:
        with raising_quire_errors():
            for event in self._call:
                if (delta := self.take(event)) is not None:
                    return delta
        raise StopIteration

    def cancel(self) -> None:
        """End the request."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class Client:
    """A connection to a router, for any number of threads.

    Args:
        address: "host:port" or "unix:/path".
        timeout_s: deadline in seconds of a whole generation, unless a call names its own.
        token: bearer token that tells the router who calls; None where it asks nobody.
        metadata: sent with every call, e.g. `(("x-request-id", "a1"),)`.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        token: str | None = None,
        metadata: Metadata = (),
    ) -> None:
        self._timeout_s = timeout_s
        self._metadata = call_metadata(token, metadata)
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._stub = router_pb2_grpc.RouterServiceStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Continue `prompt`; iterate the result for deltas. Errors come from the iteration."""
        request = generate_request(prompt, options)
        return Generation(
            self._stub.Generate(
                request, timeout=timeout_s or self._timeout_s, metadata=self._metadata
            )
        )

    def complete(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> pb.CompleteResponse:
        """Continue `prompt` and return all of it at once."""
        request = pb.CompleteRequest(request=generate_request(prompt, options))
        with raising_quire_errors():
            return self._stub.Complete(
                request, timeout=timeout_s or self._timeout_s, metadata=self._metadata
            )

    def abort(self, request_id: str) -> None:
        """End a live request; raises RequestNotFound."""
        with raising_quire_errors():
            self._stub.Abort(
                pb.AbortRequest(request_id=request_id),
                timeout=SHORT_TIMEOUT_S,
                metadata=self._metadata,
            )

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a text or a conversation, as `generate` would see them."""
        request = pb.TokenizeRequest()
        set_prompt(request, prompt)
        with raising_quire_errors():
            return list(
                self._stub.Tokenize(
                    request, timeout=SHORT_TIMEOUT_S, metadata=self._metadata
                ).token_ids
            )

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        request = pb.DetokenizeRequest(token_ids=token_ids)
        with raising_quire_errors():
            return self._stub.Detokenize(
                request, timeout=SHORT_TIMEOUT_S, metadata=self._metadata
            ).text

    def get_model(self) -> pb.GetModelResponse:
        """What is served."""
        with raising_quire_errors():
            return self._stub.GetModel(
                pb.GetModelRequest(), timeout=SHORT_TIMEOUT_S, metadata=self._metadata
            )

    def close(self) -> None:
        """Close the connection; requests that run are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
