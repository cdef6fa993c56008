"""Finding stop strings in text that arrives in pieces."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string that was found."""

    stop_string: str
    begin: int  # index of its first character in the searched text
    end: int  # index behind its last character


def find_stop(text: str, stop_strings: tuple[str, ...]) -> StopMatch | None:
    """The match that begins first in `text`; of those that begin together the one given first."""
    best: StopMatch | None = None
    for stop_string in stop_strings:
        begin = text.find(stop_string)
        if begin >= 0 and (best is None or begin < best.begin):
            best = StopMatch(stop_string, begin, begin + len(stop_string))
    return best


def held_back_length(text: str, stop_strings: tuple[str, ...]) -> int:
    """Characters at the end of `text` that may be the beginning of a stop string."""
    longest = min(len(text), max((len(found) - 1 for found in stop_strings), default=0))
    for length in range(longest, 0, -1):
        suffix = text[-length:]
        if any(found.startswith(suffix) for found in stop_strings):
            return length
    return 0
