"""What the runs of one engine on one workload came to."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.peer_engines.wire import Request, TokenTimes


@dataclass(frozen=True, slots=True)
class Run:
    """One engine's answer to one round of a workload."""

    tokens_per_s: float  # output tokens, from the first arrival to the last token
    ttft_s: list[float]  # from arrival to first token, one a request
    itl_s: list[float]  # gaps between tokens of a request

    @classmethod
    def of(cls, requests: Sequence[Request], times: Sequence[TokenTimes]) -> Self:
        """Of token times in the order of the requests.

        Raises:
            ValueError: an engine gave more or fewer tokens than it was asked for.
        """
        for request, found in zip(requests, times, strict=True):
            if len(found) != request.num_output:
                raise ValueError(f"{len(found)} tokens instead of {request.num_output}")
        num_tokens = sum(len(found) for found in times)
        return cls(
            tokens_per_s=num_tokens / max(found[-1] for found in times),
            ttft_s=[
                found[0] - request.arrival_s for request, found in zip(requests, times, strict=True)
            ],
            itl_s=[after - before for found in times for before, after in pairwise(found)],
        )


@dataclass(slots=True)
class Cell:
    """All rounds of one engine on one workload, by round; a round that is missing was not run."""

    runs: dict[int, Run] = field(default_factory=dict)
    problem: str = ""  # why no other round is run

    def rate(self) -> float:
        """Median of output tokens per second; 0 when it never finished."""
        return statistics.median([run.tokens_per_s for run in self.runs.values()] or [0.0])

    def last(self) -> str:
        """What the last run came to."""
        return self.problem or f"{list(self.runs.values())[-1].tokens_per_s:.1f} tok/s"

    def lines(self) -> str:
        """For the table: what it came to, and what went wrong."""
        if not self.runs:
            return self.problem or "no time left"
        return "\n".join(filter(None, (self._numbers(), self.problem)))

    def _numbers(self) -> str:
        runs = self.runs.values()
        rates = sorted(run.tokens_per_s for run in runs)
        ttft = percentiles([value for run in runs for value in run.ttft_s])
        itl = percentiles([value for run in runs for value in run.itl_s])
        return (
            f"{statistics.median(rates):.1f} tok/s\n({rates[0]:.1f}-{rates[-1]:.1f}, n={len(rates)})\n"
            f"TTFT {ttft[0]:.2f} / {ttft[1]:.2f} s\nITL {itl[0] * 1e3:.0f} / {itl[1] * 1e3:.0f} ms"
        )


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """50th and 99th."""
    middle, high = np.percentile(values, [50, 99])
    return float(middle), float(high)


def ratio(ours: Cell, theirs: Sequence[Cell]) -> str:
    """Ours over the fastest of theirs, median of the rounds that both ran, and the extremes."""
    best = max(theirs, key=Cell.rate, default=Cell())
    both = ours.runs.keys() & best.runs.keys()
    found = sorted(ours.runs[at].tokens_per_s / best.runs[at].tokens_per_s for at in both)
    if not found:
        return "-"
    return f"{statistics.median(found):.2f}\n({found[0]:.2f}-{found[-1]:.2f})"
