"""What the engines are asked: seeded, so that all get the same token ids, and new ones in every round."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bench.peer_engines.wire import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_RESERVED_TOKENS = 300  # ids below are end tokens and single bytes


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one length; see `requests`."""

    name: str  # as `--workloads` takes it
    title: str
    num_requests: int
    num_input: int = 128  # tokens of a prompt, the shared ones included
    num_output: int = 64
    num_shared: int = 0  # leading tokens that all prompts of a round have in common
    arrivals_per_s: float | None = None  # mean rate of a Poisson process; None: all at once

    @property
    def heading(self) -> str:
        """Of its row."""
        return f"{self.title}\n{self.num_input:,} in, {self.num_output} out"

    def requests(self, seed: int, vocab_size: int) -> list[Request]:
        """Those of the round `seed`; no prompt but for the shared part occurs twice."""
        random = np.random.default_rng([seed, *self.name.encode()])
        ids = random.integers(NUM_RESERVED_TOKENS, vocab_size, (self.num_requests, self.num_input))
        ids[:, : self.num_shared] = ids[0, : self.num_shared]
        return [
            Request(arrival_s, prompt, self.num_output)
            for arrival_s, prompt in zip(self._arrivals(random), ids.tolist(), strict=True)
        ]

    def _arrivals(self, random: np.random.Generator) -> Sequence[float]:
        """Seconds, of which the first is zero."""
        if self.arrivals_per_s is None:
            return [0.0] * self.num_requests
        gaps = random.exponential(1 / self.arrivals_per_s, self.num_requests - 1)
        return [0.0, *np.cumsum(gaps).tolist()]

    def shrunk(self) -> Workload:
        """Of the same kind, and done in a moment."""
        return replace(
            self,
            num_requests=min(self.num_requests, 3),
            num_input=min(self.num_input, 48),
            num_output=6,
            num_shared=min(self.num_shared, 32),
            arrivals_per_s=self.arrivals_per_s and 20.0,
        )


WORKLOADS = (
    Workload("1", "1 request", 1),
    Workload("16", "16 requests", 16),
    Workload("64", "64 requests", 64),
    Workload("long", "4 long requests", 4, num_input=4_000),
    Workload("prefix", "16 requests, 1,000 shared", 16, num_input=1_032, num_shared=1_000),
    Workload("poisson", "Poisson arrivals, 2 a second", 32, arrivals_per_s=2.0),
)
