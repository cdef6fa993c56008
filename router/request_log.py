"""What the log says of a request: accepted or rejected, and one line at its end. Never its text or tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from quire.errors import QuireError

if TYPE_CHECKING:
    from quire.errors import ErrorReason
    from router.request import Request, Sequence

_logger = structlog.get_logger()


def bind_tenant(tenant: str) -> None:
    """Let the records of this call name its tenant, if it has one."""
    if tenant:
        structlog.contextvars.bind_contextvars(tenant=tenant)


def ids_of(request: Request) -> dict[str, str]:
    """What names a request in a record that is not of its call."""
    tenant = {"tenant": request.tenant} if request.tenant else {}
    return {"request_id": request.request_id, **tenant}


def ids_of_sequence(sequence: Sequence) -> dict[str, str]:
    """What names a sequence in a record that is not of its call."""
    return {**ids_of(sequence.request), "sequence_id": sequence.sequence_id}


def log_accepted(request: Request) -> None:
    """The request waits for its turn."""
    _logger.debug(
        "accepted",
        request_id=request.request_id,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_samples=request.num_samples,
        max_tokens=request.max_tokens,
        priority=request.priority,
    )


def log_rejected(request_id: str, reason: ErrorReason, error: Exception) -> None:
    """The request was refused; the fields that were wrong are named, what they held is not."""
    violations = error.violations if isinstance(error, QuireError) else ()
    fields = [found.field for found in violations]
    _logger.info("rejected", request_id=request_id, reason=reason.value, fields=fields)


def log_finished(request: Request) -> None:
    """Every sample has ended. Times are seconds since the request was received."""
    assert request.finish_reason is not None
    _logger.info(
        "finished",
        request_id=request.request_id,
        finish_reason=request.finish_reason.name,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_cached_tokens=max(0, request.num_cached_tokens),
        num_output_tokens=request.num_output_tokens,
        num_samples=request.num_samples,
        queue_s=_since_received(request, request.admitted_at),
        ttft_s=_since_received(request, request.first_token_at),
        e2e_s=_since_received(request, request.finished_at),
        **_error(request),
    )


def _error(request: Request) -> dict[str, str]:
    return {"reason": request.error.reason.value} if request.error else {}


def _since_received(request: Request, moment: float) -> float | None:
    """Seconds; None for what never came."""
    return round(moment - request.received_at, 4) if moment else None
