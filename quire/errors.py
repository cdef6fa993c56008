"""What can go wrong, as exceptions that every part of Quire may raise.

    QuireError
    ├── InvalidRequest            INVALID_ARGUMENT     the request itself is wrong
    │   ├── ContextLengthExceeded INVALID_ARGUMENT     prompt and output do not fit max_model_len
    │   └── PoolTooSmall          INVALID_ARGUMENT     would not run even with the pool to itself
    ├── RequestNotFound           NOT_FOUND            no live request has this id
    ├── RequestIdInUse            ALREADY_EXISTS       a live request has this id
    ├── QueueFull                 RESOURCE_EXHAUSTED   the waiting queue is at its bound
    ├── StepFailed                INTERNAL             singled out as the cause of a failed step
    ├── NotReady                  UNAVAILABLE          shutting down, or another service is away
    ├── BrokenContract            FAILED_PRECONDITION  a message broke the contract of a stream
    ├── SessionFenced             ABORTED              a newer stream took the session over
    ├── PoolMismatch              FAILED_PRECONDITION  two services speak of different pools
    ├── WriterAlive               FAILED_PRECONDITION  a living compute service writes to this pool
    ├── BudgetTooSmall            FAILED_PRECONDITION  the budget cannot hold one longest sequence
    ├── NoPool                    UNAVAILABLE          no pool was attached yet
    ├── SequenceNotFound          NOT_FOUND            no sequence has this id
    ├── TooManySequences          RESOURCE_EXHAUSTED   as many sequences as allowed are held
    ├── BlockNotFound             NOT_FOUND            no block has this id
    ├── QuotaExceeded             RESOURCE_EXHAUSTED   needs more blocks than the tenant's hard quota
    ├── Unauthenticated           UNAUTHENTICATED      credentials missing, doubled or unknown
    └── InternalError             INTERNAL             a defect of the service

The module knows neither gRPC nor the stubs, so the pure cores may raise from it; `quire.rpc_status` turns an exception
into a status and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class ErrorReason(StrEnum):
    """Names of `quire.common.v1.ErrorReason`, without the prefix; that file explains each."""

    INVALID_REQUEST = "INVALID_REQUEST"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    POOL_TOO_SMALL = "POOL_TOO_SMALL"
    REQUEST_NOT_FOUND = "REQUEST_NOT_FOUND"
    REQUEST_ID_IN_USE = "REQUEST_ID_IN_USE"
    QUEUE_FULL = "QUEUE_FULL"
    STEP_FAILED = "STEP_FAILED"
    NOT_READY = "NOT_READY"
    BROKEN_CONTRACT = "BROKEN_CONTRACT"
    SESSION_FENCED = "SESSION_FENCED"
    POOL_MISMATCH = "POOL_MISMATCH"
    WRITER_ALIVE = "WRITER_ALIVE"
    BUDGET_TOO_SMALL = "BUDGET_TOO_SMALL"
    NO_POOL = "NO_POOL"
    SEQUENCE_NOT_FOUND = "SEQUENCE_NOT_FOUND"
    TOO_MANY_SEQUENCES = "TOO_MANY_SEQUENCES"
    INTERNAL = "INTERNAL"
    BLOCK_NOT_FOUND = "BLOCK_NOT_FOUND"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    UNAUTHENTICATED = "UNAUTHENTICATED"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is wrong."""

    field: str  # path of the field in the request, e.g. "sampling.top_p"
    description: str  # what is wrong and what is allowed


class QuireError(Exception):
    """An error with a code, a reason and the numbers of its message as metadata."""

    code: ClassVar[str] = "INTERNAL"  # name of a gRPC status code
    reason: ClassVar[ErrorReason] = ErrorReason.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, object] | None = None,
        retry_after_s: float | None = None,
        violations: Sequence[FieldViolation] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        self.retry_after_s = retry_after_s
        self.violations = tuple(violations)


class InvalidRequest(QuireError):
    """The request itself is wrong; `violations` list every offending field."""

    code = "INVALID_ARGUMENT"
    reason = ErrorReason.INVALID_REQUEST

    @classmethod
    def of(cls, violations: Sequence[FieldViolation]) -> InvalidRequest:
        """The error whose message joins `violations`."""
        message = "; ".join(f"{found.field}: {found.description}" for found in violations)
        return cls(message, violations=violations)


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output do not fit max_model_len."""

    reason = ErrorReason.CONTEXT_LENGTH_EXCEEDED


class PoolTooSmall(InvalidRequest):
    """The request would not run even with the pool to itself."""

    reason = ErrorReason.POOL_TOO_SMALL


class RequestNotFound(QuireError):
    """No live request has this id."""

    code = "NOT_FOUND"
    reason = ErrorReason.REQUEST_NOT_FOUND


class RequestIdInUse(QuireError):
    """A live request has this id."""

    code = "ALREADY_EXISTS"
    reason = ErrorReason.REQUEST_ID_IN_USE


class QueueFull(QuireError):
    """The waiting queue is at its bound."""

    code = "RESOURCE_EXHAUSTED"
    reason = ErrorReason.QUEUE_FULL


class StepFailed(QuireError):
    """A request was singled out as the cause of a failed step."""

    code = "INTERNAL"
    reason = ErrorReason.STEP_FAILED


class NotReady(QuireError):
    """The service is shutting down, or another service that it needs is away."""

    code = "UNAVAILABLE"
    reason = ErrorReason.NOT_READY


class BrokenContract(QuireError):
    """A message broke the contract of a stream. Nothing of it was applied."""

    code = "FAILED_PRECONDITION"
    reason = ErrorReason.BROKEN_CONTRACT


class SessionFenced(QuireError):
    """A newer stream took the session over, or its lease ended."""

    code = "ABORTED"
    reason = ErrorReason.SESSION_FENCED


class PoolMismatch(QuireError):
    """Two services speak of different pools."""

    code = "FAILED_PRECONDITION"
    reason = ErrorReason.POOL_MISMATCH


class WriterAlive(QuireError):
    """A living compute service writes to this pool."""

    code = "FAILED_PRECONDITION"
    reason = ErrorReason.WRITER_ALIVE


class BudgetTooSmall(QuireError):
    """The memory budget cannot hold one longest sequence."""

    code = "FAILED_PRECONDITION"
    reason = ErrorReason.BUDGET_TOO_SMALL


class NoPool(QuireError):
    """No compute service has attached a pool yet."""

    code = "UNAVAILABLE"
    reason = ErrorReason.NO_POOL


class SequenceNotFound(QuireError):
    """No sequence has this id."""

    code = "NOT_FOUND"
    reason = ErrorReason.SEQUENCE_NOT_FOUND


class TooManySequences(QuireError):
    """As many sequences as allowed are held."""

    code = "RESOURCE_EXHAUSTED"
    reason = ErrorReason.TOO_MANY_SEQUENCES


class BlockNotFound(QuireError):
    """No block has this id."""

    code = "NOT_FOUND"
    reason = ErrorReason.BLOCK_NOT_FOUND


class QuotaExceeded(QuireError):
    """The request needs more blocks than its tenant's hard quota."""

    code = "RESOURCE_EXHAUSTED"
    reason = ErrorReason.QUOTA_EXCEEDED


class Unauthenticated(QuireError):
    """The call's credentials are missing, doubled or unknown."""

    code = "UNAUTHENTICATED"
    reason = ErrorReason.UNAUTHENTICATED


class InternalError(QuireError):
    """A defect of the service."""
