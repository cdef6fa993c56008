"""Structured logs on stderr: for people on a console, JSON for machines, one record a line.

No record holds text or token ids of a request: a traceback is written without the values of its variables.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import structlog
from structlog.processors import ExceptionRenderer, JSONRenderer, TimeStamper
from structlog.tracebacks import ExceptionDictTransformer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from structlog.types import EventDict, Processor

# Metadata of a client's call that its records carry.
_CALL_IDS = {"x-request-id": "x_request_id", "traceparent": "traceparent"}
_MAX_ID_CHARS = 128


def configure(level: str, fmt: str, service: str) -> None:
    """Send this process's logs to stderr.

    Args:
        level: least severe level that is written: "debug", "info", "warning" or "error".
        fmt: "console" or "json".
        service: name that every record carries.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        # Not a context variable: threads begin without those.
        _Constant("service", service),
        TimeStamper(fmt="iso", utc=True),
    ]
    renderer = _renderer(fmt)
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    _configure_libraries(shared, renderer, as_records=fmt == "json")


def _renderer(fmt: str) -> list[Processor]:
    if fmt == "json":
        # With the variables of each frame, as is the default, a prompt would be in the log.
        return [ExceptionRenderer(ExceptionDictTransformer(show_locals=False)), JSONRenderer()]
    console = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    return [console]


def _configure_libraries(
    shared: list[Processor], renderer: list[Processor], *, as_records: bool
) -> None:
    """Libraries log through the standard module; only what an operator should act on passes."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    logging.basicConfig(level=logging.ERROR, handlers=[handler], force=True)
    if as_records:
        # A warning is two lines of text otherwise, which no parser of JSON lines takes.
        logging.captureWarnings(capture=True)
        logging.getLogger("py.warnings").setLevel(logging.WARNING)


class _Constant:
    """A processor that gives every record the same key and value."""

    def __init__(self, key: str, value: str) -> None:
        self._key = key
        self._value = value

    def __call__(self, _logger: object, _method: str, event: EventDict) -> EventDict:
        event[self._key] = self._value
        return event


def bind_call(metadata: Iterable[tuple[str, Any]] | None) -> None:
    """Let the records of this call carry the ids that its client sent: `x-request-id` and `traceparent`."""
    ids = {
        _CALL_IDS[key]: str(value)[:_MAX_ID_CHARS]
        for key, value in metadata or ()
        if key in _CALL_IDS
    }
    if ids:
        structlog.contextvars.bind_contextvars(**ids)
