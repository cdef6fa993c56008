"""How fast things happened lately."""

from __future__ import annotations

from collections import deque
from dataclasses import astuple, dataclass

_NUM_BUCKETS = 40  # what is older than the window is forgotten in so many portions


@dataclass(frozen=True, slots=True)
class Amounts:
    """What one or several changes added."""

    steps: int = 0
    computed_tokens: int = 0
    evictions: int = 0
    query_tokens: int = 0  # looked up in the prefix cache
    hit_tokens: int = 0  # found there

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class Rates:
    """What happened a second, over the window."""

    seconds: float = 0.0  # that the window covers
    steps_per_s: float = 0.0
    tokens_per_s: float = 0.0  # computed ones: hits are not among them
    evictions_per_s: float = 0.0
    hit_rate: float | None = None  # of tokens looked up within the window; None: none were


class RateWindow:
    """Amounts of the last `window_s` seconds, in a bounded number of portions."""

    def __init__(self, window_s: float, began_at: float) -> None:
        self._window_s = window_s
        self._portion_s = window_s / _NUM_BUCKETS
        self._began_at = began_at
        self._portions: deque[tuple[int, Amounts]] = deque()  # (number of the portion, its sum)

    def add(self, amounts: Amounts, now: float) -> None:
        """Count `amounts` as of `now`, which never decreases."""
        number = int(now / self._portion_s)
        if self._portions and self._portions[-1][0] == number:
            amounts += self._portions.pop()[1]
        self._portions.append((number, amounts))
        self._forget(now)

    def rates(self, now: float) -> Rates:
        """Rates as of `now`."""
        self._forget(now)
        total = sum((amounts for _, amounts in self._portions), Amounts())
        seconds = min(now - self._began_at, self._window_s)
        if seconds <= 0:
            return Rates()
        return Rates(
            seconds=seconds,
            steps_per_s=total.steps / seconds,
            tokens_per_s=total.computed_tokens / seconds,
            evictions_per_s=total.evictions / seconds,
            hit_rate=total.hit_tokens / total.query_tokens if total.query_tokens else None,
        )

    def _forget(self, now: float) -> None:
        oldest = int((now - self._window_s) / self._portion_s)
        while self._portions and self._portions[0][0] <= oldest:
            self._portions.popleft()
