"""Words for numbers, times and tenants within a sentence."""

from __future__ import annotations

from typing import Final

_LONG_S: Final = 120.0


def tenant_words(name: str) -> str:
    """A tenant within a sentence."""
    return f"tenant {name!r}" if name else "the tenant without a name"


def duration(seconds: float) -> str:
    """A length of time within a sentence."""
    return f"{seconds:.1f} s" if seconds < _LONG_S else f"{seconds / 60:.0f} min"


def counted(number: int, noun: str) -> str:
    """A number of things within a sentence."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
