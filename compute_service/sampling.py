"""Logits to tokens, without state: the same row gives the same token in any batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from compute_service.philox import uniform

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

_FEW_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Settings of a row, complete; `quire.router.v1.SamplingParams` explains each."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    num_logprobs: int  # -1: none
    min_tokens: int
    suppressed_token_ids: tuple[int, ...]
    sample_index: int = 0


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One token to draw."""

    logits_row: int  # row of the logits, several samples may share one
    sampling: RowSampling
    position: int  # of the token to be drawn
    prompt_token_ids: NDArray[np.int64]
    output_token_ids: NDArray[np.int64]
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token, and its log-probabilities when they were asked for."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> Iterator[SampledToken]:
    """Draw a token for each of `rows` from `logits`, float32 `[n, vocab]`.

    Raises:
        ValueError: when the model gave a logit that is not a number.
    """
    broken = logits.amax(dim=1).isnan()  # a maximum takes part in every NaN
    if bool(broken.any()):
        first = int(broken.nonzero()[0])
        raise ValueError(f"the model gave logits that are not numbers, first in output {first}")
    for row in rows:
        raw = logits[row.logits_row]
        token_id = _draw(_adjusted(raw, row), row)
        yield _with_logprobs(raw, token_id, row.sampling.num_logprobs)


def _adjusted(raw: Tensor, row: SampleRow) -> Tensor:
    """Bias, then the tokens that may not end it yet, then penalties."""
    sampling, logits = row.sampling, raw
    if sampling.logit_bias:
        token_ids, values = zip(*sampling.logit_bias, strict=True)
        where = torch.tensor(token_ids, device=raw.device)
        logits = logits.index_add(0, where, torch.tensor(values, device=raw.device))
    if row.num_output_tokens < sampling.min_tokens:
        suppressed = torch.tensor(sampling.suppressed_token_ids, device=raw.device)
        logits = logits.index_fill(0, suppressed, -torch.inf)
    return _penalized(logits, row)


def _penalized(logits: Tensor, row: SampleRow) -> Tensor:
    sampling = row.sampling
    if sampling.repetition_penalty != 1:
        known = np.unique(np.concatenate([row.prompt_token_ids, row.output_token_ids]))
        seen = torch.from_numpy(known).to(logits.device)
        found = logits.index_select(0, seen)
        factor = sampling.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(found > 0, found / factor, found * factor))
    if sampling.frequency_penalty or sampling.presence_penalty:
        numbers = np.bincount(row.output_token_ids, minlength=len(logits))
        counts = torch.from_numpy(numbers).to(logits.device).float()
        logits = logits - sampling.frequency_penalty * counts
        logits -= sampling.presence_penalty * (counts > 0)
    return logits


def _draw(logits: Tensor, row: SampleRow) -> int:
    """Inverse of the cumulative distribution, in order of token ids, at one uniform number."""
    sampling = row.sampling
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = _filtered(torch.softmax(logits.double() / sampling.temperature, 0), sampling)
    cumulative = probabilities.cumsum(0)
    noise = uniform(sampling.seed, sampling.sample_index, row.position)
    found = int(torch.searchsorted(cumulative, noise * cumulative[-1], right=True))
    # Rounding may leave the number at the very end, behind the last possible token.
    return min(found, int(probabilities.nonzero()[-1]))


def _filtered(probabilities: Tensor, sampling: RowSampling) -> Tensor:
    """Top-k, top-p and min-p, each a threshold on what the one before left; tokens as likely as the last stay."""
    if 0 < sampling.top_k < len(probabilities):
        least = probabilities.topk(sampling.top_k).values[-1]
        probabilities = probabilities.where(probabilities >= least, 0.0)
    if sampling.top_p < 1:
        least = _least_of_mass(probabilities, sampling.top_p)
        probabilities = probabilities.where(probabilities >= least, 0.0)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.max()
        probabilities = probabilities.where(probabilities >= least, 0.0)
    return probabilities


def _least_of_mass(probabilities: Tensor, share: float) -> Tensor:
    """The least of the most likely tokens that together have `share` of the mass."""
    wanted = share * probabilities.sum()
    # Nearly always the first thousand have it; to sort a whole vocabulary takes ten times as long.
    for count in (min(_FEW_TOKENS, len(probabilities)), len(probabilities)):
        ordered = probabilities.topk(count).values
        cumulative = ordered.cumsum(0)
        if cumulative[-1] >= wanted:
            break
    return ordered[cumulative - ordered < wanted][-1]


def _with_logprobs(raw: Tensor, token_id: int, num_logprobs: int) -> SampledToken:
    if num_logprobs < 0:
        return SampledToken(token_id, None, ())
    logprobs = torch.log_softmax(raw, 0)
    top = logprobs.topk(min(num_logprobs, len(raw)))
    return SampledToken(
        token_id,
        float(logprobs[token_id]),
        tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )
