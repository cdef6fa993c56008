"""Structured logs on stderr: for people on a console, JSON for machines."""

from __future__ import annotations

import logging
import sys

import structlog


def configure(level: str, fmt: str, service: str) -> None:
    """Send this process's logs to stderr.

    Args:
        level: least severe level that is written: "debug", "info", "warning" or "error".
        fmt: "console" or "json".
        service: name bound to every record.
    """
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if fmt == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.dict_tracebacks if fmt == "json" else _keep,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    # Libraries log through the standard module; only what an operator should act on passes.
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, force=True)


def _keep(
    _logger: object, _method: str, event: structlog.types.EventDict
) -> structlog.types.EventDict:
    return event
