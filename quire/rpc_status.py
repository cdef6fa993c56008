"""`QuireError` to gRPC status and back: one ErrorInfo, and BadRequest or RetryInfo where they help."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from quire import errors

if TYPE_CHECKING:
    from google.protobuf.message import Message

DOMAIN = "quire"

_CLASS_OF_REASON: dict[str, type[errors.QuireError]] = {
    found.reason.value: found
    for found in (
        errors.InvalidRequest,
        errors.ContextLengthExceeded,
        errors.PoolTooSmall,
        errors.RequestNotFound,
        errors.RequestIdInUse,
        errors.QueueFull,
        errors.StepFailed,
        errors.NotReady,
        errors.BrokenContract,
        errors.SessionFenced,
        errors.PoolMismatch,
        errors.WriterAlive,
        errors.BudgetTooSmall,
        errors.NoPool,
        errors.SequenceNotFound,
        errors.TooManySequences,
        errors.BlockNotFound,
        errors.QuotaExceeded,
        errors.Unauthenticated,
        errors.InternalError,
    )
}


class RemoteError(errors.QuireError):
    """An error without a reason of ours: the transport's, or another server's."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message, metadata={"code": code.name})
        self.status_code = code
        self.code = code.name  # type: ignore[misc]  # every other error has the code of its class


def to_status(error: errors.QuireError) -> grpc.Status:
    """The status that `context.abort_with_status` sends for `error`."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message)
    for detail in _details(error):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return rpc_status.to_status(status)


def _details(error: errors.QuireError) -> list[Message]:
    info = error_details_pb2.ErrorInfo(
        reason=error.reason.value, domain=DOMAIN, metadata=error.metadata
    )
    details: list[Message] = [info]
    if error.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=found.field, description=found.description
                    )
                    for found in error.violations
                ]
            )
        )
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(max(1, round(error.retry_after_s * 1000)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details


def from_rpc_error(error: grpc.RpcError) -> errors.QuireError:
    """The exception that a failed call stands for; a `RemoteError` when the status names no reason of ours."""
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    except ValueError:
        status = None  # code and details contradict each other: no status of ours
    code = error.code() or grpc.StatusCode.UNKNOWN
    if status is None:
        return RemoteError(code, error.details() or code.name)
    return _from_status(status, code)


def _from_status(status: status_pb2.Status, code: grpc.StatusCode) -> errors.QuireError:
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry_info = error_details_pb2.RetryInfo()
    for detail in status.details:
        for message in (info, bad_request, retry_info):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    found = _CLASS_OF_REASON.get(info.reason) if info.domain == DOMAIN else None
    if found is None:
        return RemoteError(code, status.message)
    return found(
        status.message,
        metadata=dict(info.metadata),
        retry_after_s=retry_info.retry_delay.ToMilliseconds() / 1000
        if retry_info.HasField("retry_delay")
        else None,
        violations=[
            errors.FieldViolation(violation.field, violation.description)
            for violation in bad_request.field_violations
        ],
    )
