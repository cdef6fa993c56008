"""Lengths of requests: log-normal, fitted to published means, cut where the model ends.

Means: PagedAttention (arXiv 2309.06180, section 6.1) for ShareGPT and Alpaca; LMSYS-Chat-1M (arXiv 2309.11998, Table 1).
No source prints a deviation. That of the outputs follows from PagedAttention's Figure 2: Orca (Max) holds 20.4 % of its
15,728 slots with seven requests, 458 tokens each on average over time. A request of P tokens in and O out holds
P + E[O^2] / 2 E[O] on that average, so E[O^2] / E[O]^2 = 1.76. The inputs' is an assumption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

MAX_MODEL_LEN = 2048
OUTPUT_CV = 0.87  # coefficient of variation, see above
INPUT_CV = 1.0
VOCAB_SIZE = 50_272


@dataclass(frozen=True, slots=True)
class Request:
    """All tokens that a request will ever have; without a model they are known beforehand."""

    token_ids: NDArray[np.int32]  # prompt, then output
    num_prompt_tokens: int
    num_samples: int = 1

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated, by each sample."""
        return len(self.token_ids) - self.num_prompt_tokens

    def num_blocks(self, block_size: int) -> int:
        """Blocks that it needs alone at most; samples share the full blocks of the prompt."""
        num_shared = self.num_prompt_tokens // block_size
        num_own = -(-len(self.token_ids) // block_size) - num_shared
        return (
            num_shared + self.num_samples * num_own + 1
        )  # the first copy's source is pinned meanwhile

    def sample(self, index: int) -> NDArray[np.int32]:
        """The same prompt with an output that no other sample has."""
        token_ids = self.token_ids.copy()
        token_ids[self.num_prompt_tokens :] += index * VOCAB_SIZE
        return token_ids


@dataclass(frozen=True, slots=True)
class Workload:
    """Where requests come from."""

    name: str
    mean_input: float
    mean_output: float
    input_cv: float = INPUT_CV
    output_cv: float = OUTPUT_CV
    num_prefix_tokens: int = 0  # the same for all requests, before their own input
    num_samples: int = 1

    def sampled(self, num_samples: int) -> Workload:
        """The same requests, each with as many samples."""
        return replace(self, num_samples=num_samples)

    def shrunk(self, factor: int) -> Workload:
        """The same shape with shorter inputs and outputs."""
        return replace(
            self, mean_input=self.mean_input / factor, mean_output=self.mean_output / factor
        )

    def requests(self, count: int, seed: int) -> Iterator[Request]:
        """`count` requests; the same for the same seed."""
        rng = np.random.default_rng(seed)
        prefix = rng.integers(VOCAB_SIZE, size=self.num_prefix_tokens, dtype=np.int32)
        num_inputs = np.minimum(
            _lengths(rng, count, self.mean_input, self.input_cv), MAX_MODEL_LEN // 2
        )
        num_outputs = _lengths(rng, count, self.mean_output, self.output_cv)
        for num_input, num_output in zip(num_inputs.tolist(), num_outputs.tolist(), strict=True):
            own = rng.integers(VOCAB_SIZE, size=num_input + num_output, dtype=np.int32)
            token_ids = np.concatenate([prefix, own])[:MAX_MODEL_LEN]
            yield Request(token_ids, len(prefix) + num_input, self.num_samples)


def _lengths(rng: np.random.Generator, count: int, mean: float, cv: float) -> NDArray[np.int64]:
    """Log-normal lengths, of at least one token."""
    variance = math.log(1 + cv * cv)
    drawn = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), count)
    return np.maximum(1, np.rint(drawn)).astype(np.int64)


SHAREGPT = Workload("ShareGPT", 161.31, 337.99)
LMSYS = Workload("LMSYS-Chat-1M", 69.5, 214.5)
ALPACA = Workload("Alpaca", 19.31, 58.45)
# Translation after one example or five. The paper gives the prefixes; sentences of 30 tokens, in and out, are assumed.
ONE_SHOT = Workload("one-shot", 30, 30, 0.5, 0.5, num_prefix_tokens=80)
FIVE_SHOT = Workload("five-shot", 30, 30, 0.5, 0.5, num_prefix_tokens=341)
