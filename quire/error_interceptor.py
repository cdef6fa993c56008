"""Turns exceptions of handlers into statuses, for every method of ours."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from quire.errors import InternalError, QuireError
from quire.logs import bind_call
from quire.rpc_status import to_status

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

_logger = structlog.get_logger()


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns exceptions of handlers into statuses, so that no handler speaks of codes.

    A `QuireError` becomes its own status; anything else is logged under a random id and becomes INTERNAL with that id,
    so that no trace leaves the process. Records of the call carry the ids of its metadata (`quire.logs.bind_call`).
    """

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of the call, wrapped."""
        handler = await continuation(handler_call_details)
        # Health and reflection bring handlers of their own; an unknown method has none.
        if handler is None or not handler_call_details.method.startswith("/quire."):
            return handler
        if handler.response_streaming:
            return _wrap_streaming(handler, handler_call_details.method)
        return grpc.unary_unary_rpc_method_handler(
            _guard_unary(handler.unary_unary, handler_call_details.method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _wrap_streaming(
    handler: grpc.RpcMethodHandler[Any, Any], method: str
) -> grpc.RpcMethodHandler[Any, Any]:
    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(
            _guard_stream(handler.stream_stream, method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
    return grpc.unary_stream_rpc_method_handler(
        _guard_stream(handler.unary_stream, method),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _guard_unary(behavior: Any, method: str) -> Any:  # noqa: ANN401 -- grpc's own handler types are untyped callables
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: ANN401 -- as above
        bind_call(context.invocation_metadata())
        try:
            return await behavior(request, context)
        except Exception as error:  # noqa: BLE001 -- the one place that turns exceptions into statuses
            await _abort(context, error, method)

    return guarded


def _guard_stream(behavior: Any, method: str) -> Any:  # noqa: ANN401 -- grpc's own handler types are untyped callables
    async def guarded(
        request: Any,  # noqa: ANN401 -- as above
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[Any]:
        bind_call(context.invocation_metadata())
        responses = behavior(request, context)
        try:
            async for response in responses:
                yield response
        except Exception as error:  # noqa: BLE001 -- the one place that turns exceptions into statuses
            await _abort(context, error, method)
        finally:
            await responses.aclose()

    return guarded


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str
) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, QuireError):
        error = _internal(error, method)
    status = to_status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)


def _internal(error: Exception, method: str) -> InternalError:
    error_id = secrets.token_hex(8)
    _logger.error("call_failed", method=method, error_id=error_id, exc_info=error)
    return InternalError(
        f"internal error; the service's log has it under {error_id}",
        metadata={"error_id": error_id},
    )
