"""The client for asyncio; `quire.client.sync` with `await`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, Unpack

import grpc

from protos.router.v1 import router_pb2 as pb
from protos.router.v1 import router_pb2_grpc
from quire.client.channel import DEFAULT_TIMEOUT_S, OPTIONS, SHORT_TIMEOUT_S
from quire.client.credentials import call_metadata
from quire.client.progress import GenerationProgress
from quire.client.requests import GenerateOptions, Prompt, generate_request, set_prompt
from quire.client.sync import raising_quire_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.client.credentials import Metadata


class AsyncGeneration(GenerationProgress):
    """Iterates the deltas of a request with `async for`; see `quire.client.Generation`."""

    def __init__(
        self, call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]
    ) -> None:
        super().__init__()
        self._call = call

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> pb.Delta:
        with raising_quire_errors():
            while isinstance(event := await self._call.read(), pb.GenerateResponse):
                if (delta := self.take(event)) is not None:
                    return delta
        raise StopAsyncIteration

    def cancel(self) -> None:
        """End the request."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


class AsyncClient:
    """A connection to a router for one event loop; arguments and methods as `quire.client.Client`."""

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
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._stub = router_pb2_grpc.RouterServiceStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGeneration:
        """Continue `prompt`; `async for` over the result gives deltas. Errors come from the iteration."""
        request = generate_request(prompt, options)
        return AsyncGeneration(
            self._stub.Generate(
                request, timeout=timeout_s or self._timeout_s, metadata=self._metadata
            )
        )

    async def complete(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> pb.CompleteResponse:
        """Continue `prompt` and return all of it at once."""
        request = pb.CompleteRequest(request=generate_request(prompt, options))
        with raising_quire_errors():
            return await self._stub.Complete(
                request, timeout=timeout_s or self._timeout_s, metadata=self._metadata
            )

    async def abort(self, request_id: str) -> None:
        """End a live request; raises RequestNotFound."""
        with raising_quire_errors():
            await self._stub.Abort(
                pb.AbortRequest(request_id=request_id),
                timeout=SHORT_TIMEOUT_S,
                metadata=self._metadata,
            )

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a text or a conversation, as `generate` would see them."""
        request = pb.TokenizeRequest()
        set_prompt(request, prompt)
        with raising_quire_errors():
            answer = await self._stub.Tokenize(
                request, timeout=SHORT_TIMEOUT_S, metadata=self._metadata
            )
        return list(answer.token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        request = pb.DetokenizeRequest(token_ids=token_ids)
        with raising_quire_errors():
            answer = await self._stub.Detokenize(
                request, timeout=SHORT_TIMEOUT_S, metadata=self._metadata
            )
        return answer.text

    async def get_model(self) -> pb.GetModelResponse:
        """What is served."""
        with raising_quire_errors():
            return await self._stub.GetModel(
                pb.GetModelRequest(), timeout=SHORT_TIMEOUT_S, metadata=self._metadata
            )

    async def close(self) -> None:
        """Close the connection; requests that run are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
