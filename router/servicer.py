"""The gRPC face of the router."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from protos.router.v1 import router_pb2 as pb
from protos.router.v1 import router_pb2_grpc
from quire import __version__
from quire.errors import ErrorReason, FieldViolation, InvalidRequest, NotReady, QuireError
from router import messages
from router.intake import Prompt
from router.output_stream import OutputStream
from router.request import Finish
from router.request_log import bind_tenant, log_accepted, log_finished, log_rejected
from router.sampling_params import token_id_violations

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import grpc

    from router.node import Node
    from router.request import Request
    from router.tenants import Tenants

# Tokenizing longer texts would hold up the steps of everybody else; a thread costs 50 microseconds.
_INLINE_CHARS = 2_000
# Nobody sees output of Complete before its end; taken now and then, it need not all be decoded in one turn of the loop.
_COMPLETE_INTERVAL_S = 1.0


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """Implements `quire.router.v1.RouterService`; that file holds the contract."""

    def __init__(self, tenants: Tenants, stream_interval_s: float = 0.0) -> None:
        self._tenants = tenants
        self._stream_interval_s = stream_interval_s
        self._connected: Node | None = None

    def serve(self, node: Node) -> None:
        """From now on calls are answered; before, they end with NOT_READY."""
        self._connected = node

    @property
    def _node(self) -> Node:
        if self._connected is None:
            reason = "the router waits for the memory service and the compute service"
            raise NotReady(reason, retry_after_s=1.0)
        return self._connected

    async def Generate(
        self,
        request: pb.GenerateRequest,
        context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse],
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream one request."""
        live, stream = await self._accept(request, context, self._stream_interval_s)
        with self._aborted_at_exit(live):
            yield pb.GenerateResponse(accepted=messages.accepted(live))
            while events := await stream.events():
                for event in events:
                    if isinstance(event, Finish):
                        yield pb.GenerateResponse(finished=messages.finished(event))
                    else:
                        yield messages.delta(*event)

    async def Complete(
        self,
        request: pb.CompleteRequest,
        context: grpc.aio.ServicerContext[pb.CompleteRequest, pb.CompleteResponse],
    ) -> pb.CompleteResponse:
        """Answer one request whole."""
        live, stream = await self._accept(request.request, context, _COMPLETE_INTERVAL_S)
        with self._aborted_at_exit(live):
            completions = [pb.Completion() for _ in range(live.num_samples)]
            while events := await stream.events():
                for event in events:
                    if isinstance(event, Finish):
                        completions[event.sample_index].finished.CopyFrom(messages.finished(event))
                    else:
                        messages.extend(completions[event[0]], event[1])
            return pb.CompleteResponse(
                request_id=live.request_id, seed=live.seed, completions=completions
            )

    async def Abort(
        self,
        request: pb.AbortRequest,
        context: grpc.aio.ServicerContext[pb.AbortRequest, pb.AbortResponse],
    ) -> pb.AbortResponse:
        """End a live request."""
        tenant = self._identify(context)
        if not request.request_id:
            raise InvalidRequest.of([FieldViolation("request_id", "is empty")])
        self._node.abort(self._node.find(tenant, request.request_id))
        return pb.AbortResponse()

    async def Tokenize(
        self,
        request: pb.TokenizeRequest,
        context: grpc.aio.ServicerContext[pb.TokenizeRequest, pb.TokenizeResponse],
    ) -> pb.TokenizeResponse:
        """Turn a prompt into tokens."""
        self._identify(context)
        prompt = await self._tokenize(request)
        return pb.TokenizeResponse(token_ids=prompt.token_ids)

    async def Detokenize(
        self,
        request: pb.DetokenizeRequest,
        context: grpc.aio.ServicerContext[pb.DetokenizeRequest, pb.DetokenizeResponse],
    ) -> pb.DetokenizeResponse:
        """Turn tokens into text."""
        self._identify(context)
        violations = [
            violation
            for index, token_id in enumerate(request.token_ids)
            for violation in token_id_violations(
                f"token_ids[{index}]", token_id, self._node.model.vocab_size
            )
        ]
        if violations:
            raise InvalidRequest.of(violations[:1])
        return pb.DetokenizeResponse(text=self._node.tokenizer.decode(request.token_ids))

    async def GetModel(
        self,
        request: pb.GetModelRequest,
        context: grpc.aio.ServicerContext[pb.GetModelRequest, pb.GetModelResponse],
    ) -> pb.GetModelResponse:
        """Describe what is served."""
        self._identify(context)
        model = self._node.model
        return pb.GetModelResponse(
            served_model_name=self._node.served_model_name,
            architecture=model.architecture,
            dtype=model.dtype,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=sorted(model.eos_token_ids),
            has_chat_template=self._node.chat_template is not None,
            quire_version=__version__,
        )

    def _identify(self, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        """The tenant of the call; raises Unauthenticated."""
        tenant = self._tenants.of(context.invocation_metadata())
        bind_tenant(tenant)
        return tenant

    async def _accept(
        self,
        message: pb.GenerateRequest,
        context: grpc.aio.ServicerContext[Any, Any],
        interval_s: float,
    ) -> tuple[Request, OutputStream]:
        """Let a request wait for its turn; a request is accepted or rejected, and counted as one of both."""
        received_at = self._node.tally.now()
        try:
            request, stream = await self._build(message, self._identify(context), interval_s)
            self._node.add(request, received_at)
        except Exception as error:
            reason = error.reason if isinstance(error, QuireError) else ErrorReason.INTERNAL
            self._node.tally.rejected(reason)
            log_rejected(message.request_id, reason, error)
            raise
        log_accepted(request)
        return request, stream

    async def _build(
        self, message: pb.GenerateRequest, tenant: str, interval_s: float
    ) -> tuple[Request, OutputStream]:
        if self._node.is_draining:
            reason = "the router is shutting down; repeat on another one"
            raise NotReady(reason, retry_after_s=1.0)
        prompt = await self._prompt(message)
        sampling = messages.sampling_params(message.sampling)
        stream = OutputStream(sampling.num_samples, interval_s)
        request = self._node.intake.build(
            message.request_id,
            prompt,
            sampling,
            messages.stopping_criteria(message.stopping),
            message.priority,
            stream,
            tenant=tenant,
        )
        return request, stream

    async def _prompt(self, message: pb.GenerateRequest) -> Prompt:
        if message.WhichOneof("prompt") == "tokens":
            return Prompt(message.tokens.ids, "tokens.ids")
        return await self._tokenize(message)

    async def _tokenize(self, message: pb.GenerateRequest | pb.TokenizeRequest) -> Prompt:
        kind = message.WhichOneof("prompt")
        if kind == "text":
            return Prompt(await self._encode(message.text, add_special_tokens=True), "text")
        if kind == "conversation":
            text = self._render(message.conversation)
            token_ids = await self._encode(text, add_special_tokens=False)
            return Prompt(token_ids, "conversation", is_conversation=True)
        raise InvalidRequest.of([FieldViolation("prompt", "is missing; set one of its fields")])

    def _render(self, conversation: pb.Conversation) -> str:
        if not conversation.messages:
            raise InvalidRequest.of([FieldViolation("conversation.messages", "is empty")])
        template = self._node.chat_template
        if template is None:
            reason = "this model has no chat template; send text or tokens"
            raise InvalidRequest.of([FieldViolation("conversation", reason)])
        return template.render(
            [{"role": found.role, "content": found.content} for found in conversation.messages]
        )

    async def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if not text:
            return []
        encode = self._node.tokenizer.encode
        if len(text) <= _INLINE_CHARS:
            return encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(encode, text, add_special_tokens=add_special_tokens)

    @contextmanager
    def _aborted_at_exit(self, request: Request) -> Iterator[None]:
        """However the call ends (cancelled, past its deadline, or well), the request ends with it."""
        try:
            yield
        finally:
            self._node.abort(request)
            log_finished(request)
