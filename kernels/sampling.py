"""Choosing tokens by their logits, in plain torch: on a GPU this runs, for the CPU it says what is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

_FEW_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Draws:
    """Tokens to draw, one an element of each array `[m]`."""

    temperatures: NDArray[np.float64]  # above 0
    top_ks: NDArray[np.int64]  # 0: all tokens
    top_ps: NDArray[np.float64]  # 1: all
    min_ps: NDArray[np.float64]  # 0: all
    noise: NDArray[np.float64]  # in [0, 1)


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of `[n, vocab]` the first token of its largest logit, int64 `[n]`, and bool `[n]`: it has a NaN."""
    token_ids = logits.argmax(dim=1)  # takes a NaN for the largest
    return token_ids, logits.gather(1, token_ids[:, None])[:, 0].isnan()


def draw(logits: Tensor, draws: Draws) -> Tensor:
    """A token each (int64 `[m]`): the inverse of the cumulative distribution, in order of token ids, at the noise.

    Args:
        logits: float32 `[m, vocab]` without NaN.
        draws: top-k, top-p and min-p are thresholds, each on what the one before left; tokens as likely as the last stay.
    """
    device = logits.device
    temperatures, noise = (
        torch.from_numpy(found).to(device) for found in (draws.temperatures, draws.noise)
    )
    probabilities = torch.softmax(logits.double() / temperatures[:, None], 1)
    probabilities = _filtered(probabilities, draws)
    cumulative = probabilities.cumsum(1)
    wanted = (noise * cumulative[:, -1])[:, None]
    found = torch.searchsorted(cumulative, wanted, right=True)[:, 0]
    # Rounding may leave the number at the very end, behind the last possible token.
    last = logits.shape[1] - 1 - (probabilities > 0).flip(1).int().argmax(1)
    return torch.minimum(found, last)


def _filtered(probabilities: Tensor, draws: Draws) -> Tensor:
    vocab_size = probabilities.shape[1]
    for where, least in (
        ((draws.top_ks > 0) & (draws.top_ks < vocab_size), _least_of_count),
        (draws.top_ps < 1, _least_of_mass),
        (draws.min_ps > 0, _least_of_share),
    ):
        if where.any():
            chosen = torch.from_numpy(where.nonzero()[0]).to(probabilities.device)
            found = probabilities[chosen]
            kept = found.where(found >= least(found, draws, where)[:, None], 0.0)
            probabilities = probabilities.index_copy(0, chosen, kept)
    return probabilities


def _least_of_count(probabilities: Tensor, draws: Draws, where: NDArray[np.bool_]) -> Tensor:
    counts = torch.from_numpy(draws.top_ks[where]).to(probabilities.device)
    ordered = probabilities.topk(int(counts.max())).values
    return ordered.gather(1, counts[:, None] - 1)[:, 0]


def _least_of_mass(probabilities: Tensor, draws: Draws, where: NDArray[np.bool_]) -> Tensor:
    """The least of the most likely tokens that together have the share `top_p` of the mass."""
    shares = torch.from_numpy(draws.top_ps[where]).to(probabilities.device)
    wanted = (shares * probabilities.sum(1))[:, None]
    # Nearly always the first thousand have it; to sort a whole vocabulary takes ten times as long.
    for count in (min(_FEW_TOKENS, probabilities.shape[1]), probabilities.shape[1]):
        ordered = probabilities.topk(count).values
        cumulative = ordered.cumsum(1)
        if bool((cumulative[:, -1:] >= wanted).all()):
            break
    num_needed = (cumulative - ordered < wanted).sum(1, keepdim=True)
    return ordered.gather(1, num_needed - 1)[:, 0]


def _least_of_share(probabilities: Tensor, draws: Draws, where: NDArray[np.bool_]) -> Tensor:
    shares = torch.from_numpy(draws.min_ps[where]).to(probabilities.device)
    return shares * probabilities.amax(1)
