"""Retentions and published prefixes have numbers inside and names outside, so that none passes for the other."""

from __future__ import annotations

from typing import Final

from quire.errors import FieldViolation, InvalidRequest

_RETENTION: Final = "r-"
_PREFIX: Final = "p-"
_MAX_DIGITS: Final = 18  # those of an int64


def retention_name(retention_id: int) -> str:
    """The name of a retention."""
    return f"{_RETENTION}{retention_id}"


def prefix_name(prefix_id: int) -> str:
    """The name of a published prefix."""
    return f"{_PREFIX}{prefix_id}"


def parse_retention(name: str) -> int:
    """The number of a retention; raises InvalidRequest."""
    return _parse("retention_id", name, _RETENTION)


def parse_prefix(name: str) -> int:
    """The number of a published prefix; raises InvalidRequest."""
    return _parse("prefix_id", name, _PREFIX)


def _parse(field: str, name: str, kind: str) -> int:
    number = name.removeprefix(kind)
    is_number = number.isascii() and number.isdecimal() and len(number) <= _MAX_DIGITS
    if not (name.startswith(kind) and is_number):
        raise InvalidRequest.of([FieldViolation(field, f"is not {kind} and a number: {name!r}")])
    return int(number)
