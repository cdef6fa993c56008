"""Logits to tokens, without state: the same row gives the same token in any batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from compute_service.philox import uniform
from kernels import numba_sampling
from kernels import sampling as plain_sampling
from kernels.sampling import Draws

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor


class _Operations(Protocol):
    """Of `kernels.sampling`, for a device."""

    def most_likely(self, logits: Tensor, /) -> tuple[Tensor, Tensor]:
        """The largest logit of each row."""

    def draw(self, logits: Tensor, draws: Draws, /) -> Tensor:
        """Tokens by chance."""


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
    prompt_token_ids: NDArray[np.int32]
    output_token_ids: NDArray[np.int32]
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token, and its log-probabilities when they were asked for."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> list[SampledToken]:
    """Draw a token for each of `rows` from `logits`, `[n, vocab]`.

    Raises:
        ValueError: when the model gave a logit that is not a number.
    """
    highest, is_broken = _operations(logits.device).most_likely(logits)
    if bool(is_broken.any()):
        first = int(is_broken.nonzero()[0])
        raise ValueError(f"the model gave logits that are not numbers, first in output {first}")
    most_likely = highest.tolist()
    token_ids = [most_likely[row.logits_row] for row in rows]
    others = [index for index, row in enumerate(rows) if not _takes_highest(row)]
    if others:
        drawn = _drawn(logits, [rows[index] for index in others])
        for index, token_id in zip(others, drawn, strict=True):
            token_ids[index] = token_id
    return [
        _with_logprobs(logits, row, token_id) for row, token_id in zip(rows, token_ids, strict=True)
    ]


def warm_up(logits: Tensor) -> None:
    """Compile what chooses tokens of logits such as these, so that no step waits for that."""
    operations, one = _operations(logits.device), np.ones(1)
    operations.most_likely(logits)
    operations.draw(logits[:1].float(), Draws(one, one.astype(np.int64), one, one, np.zeros(1)))


def _operations(device: torch.device) -> _Operations:
    return numba_sampling if device.type == "cpu" else plain_sampling


def _takes_highest(row: SampleRow) -> bool:
    return row.sampling.temperature == 0 and not _is_adjusted(row)


def _is_adjusted(row: SampleRow) -> bool:
    sampling = row.sampling
    return bool(
        sampling.logit_bias
        or row.num_output_tokens < sampling.min_tokens
        or sampling.repetition_penalty != 1
        or sampling.frequency_penalty
        or sampling.presence_penalty
    )


def _drawn(logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Tokens of rows that are adjusted or drawn by chance."""
    own = logits[[row.logits_row for row in rows]].float()
    for index, row in enumerate(rows):
        if _is_adjusted(row):
            own[index] = _adjusted(own[index], row)
    draw = _operations(own.device).draw
    chances = [index for index, row in enumerate(rows) if row.sampling.temperature]
    if len(chances) == len(rows):
        token_ids = draw(own, _draws(rows))
    else:
        token_ids = own.argmax(dim=1)
        if chances:
            token_ids[chances] = draw(own[chances], _draws([rows[index] for index in chances]))
    found: list[int] = token_ids.tolist()
    return found


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
        seen = torch.from_numpy(known.astype(np.int64)).to(logits.device)
        found = logits.index_select(0, seen)
        factor = sampling.repetition_penalty
        logits = logits.index_copy(0, seen, torch.where(found > 0, found / factor, found * factor))
    if sampling.frequency_penalty or sampling.presence_penalty:
        numbers = np.bincount(row.output_token_ids, minlength=len(logits))
        counts = torch.from_numpy(numbers).to(logits.device).float()
        logits = logits - sampling.frequency_penalty * counts
        logits -= sampling.presence_penalty * (counts > 0)
    return logits


def _draws(rows: Sequence[SampleRow]) -> Draws:
    settings = [row.sampling for row in rows]
    return Draws(
        temperatures=np.array([found.temperature for found in settings], dtype=np.float64),
        top_ks=np.array([found.top_k for found in settings], dtype=np.int64),
        top_ps=np.array([found.top_p for found in settings], dtype=np.float64),
        min_ps=np.array([found.min_p for found in settings], dtype=np.float64),
        noise=uniform(
            [found.seed for found in settings],
            [found.sample_index for found in settings],
            [row.position for row in rows],
        ),
    )


def _with_logprobs(logits: Tensor, row: SampleRow, token_id: int) -> SampledToken:
    count = row.sampling.num_logprobs
    if count < 0:
        return SampledToken(token_id, None, ())
    # Row by row: what one needs in between stays in the cache.
    logprobs = torch.log_softmax(logits[row.logits_row].float(), 0)
    top = logprobs.topk(min(count, len(logprobs)))
    return SampledToken(
        token_id,
        float(logprobs[token_id]),
        tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )
