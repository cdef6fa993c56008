"""Sequences that wait for admission, most urgent first."""

from __future__ import annotations

from bisect import insort
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from router.request import Sequence


def _urgency(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.urgency


class WaitingQueue:
    """A sorted list: a few hundred entries, read from the front at every step, so nothing cleverer pays."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        """Sequences that wait."""
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """Most urgent first."""
        return iter(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Put `sequence` in its place."""
        insort(self._sequences, sequence, key=_urgency)

    def remove(self, sequence: Sequence) -> None:
        """Take `sequence` out; it must wait."""
        self._sequences.remove(sequence)

    def first(self, count: int) -> list[Sequence]:
        """The `count` most urgent."""
        return list(islice(self._sequences, count))
