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
    longest = 0
    for stop_string in stop_strings:
        longest = max(longest, _overlap(text, stop_string))
    return longest


def _overlap(text: str, stop_string: str) -> int:
    """Length of the longest end of `text` that begins `stop_string` and is not all of it."""
    first = stop_string[0]
    begin = text.find(first, max(0, len(text) - len(stop_string) + 1))
    while begin >= 0 and not stop_string.startswith(text[begin:]):
        begin = text.find(first, begin + 1)
    return len(text) - begin if begin >= 0 else 0
