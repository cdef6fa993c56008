"""The CPU's choice of tokens against plain torch: the same token for every row, whatever its settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import numba_sampling, sampling
from kernels.sampling import Draws

NUM_ROWS = 96
# Whether a vocabulary fills one run of tokens, several, or a part of the last.
VOCAB_SIZES = (3, 50, 1024, 5000)
SETTINGS = [
    {},
    {"temperature": 0.01},
    {"temperature": 4.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 900},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "temperature": 1.5},
]


def make_draws(count: int, **settings: float) -> Draws:
    def filled(name: str, neutral: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.full(count, settings.get(name, neutral))

    return Draws(
        filled("temperature", 1.0),
        filled("top_k", 0).astype(np.int64),
        filled("top_p", 1.0),
        filled("min_p", 0.0),
        np.random.default_rng(0).random(count),
    )


def make_logits(vocab_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    return (3 * torch.randn(NUM_ROWS, vocab_size, generator=generator)).to(dtype)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws(settings: dict[str, float], vocab_size: int, dtype: torch.dtype) -> None:
    """Logits of bfloat16 have many ties, which stay together at every threshold."""
    logits = make_logits(vocab_size, dtype).float()
    logits[1, ::2] = -torch.inf
    draws = make_draws(NUM_ROWS, **settings)
    assert torch.equal(numba_sampling.draw(logits, draws), sampling.draw(logits, draws))


def test_the_ends_of_the_noise() -> None:
    """Zero draws the first token that can be, the largest number below one the last, never an impossible one."""
    logits = torch.zeros(2, 3000)
    logits[:, :5] = logits[:, 2990:] = -torch.inf
    draws = make_draws(2)
    draws.noise[:] = 0.0, np.nextafter(1.0, 0.0)
    for operations in (numba_sampling, sampling):
        assert operations.draw(logits, draws).tolist() == [5, 2989]


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_most_likely(vocab_size: int, dtype: torch.dtype) -> None:
    """The first of equal ones, negative zero among them; rows with a NaN, of either sign, are told."""
    logits = make_logits(vocab_size, dtype)
    logits[0] = -1.0
    logits[0, 1:] = torch.tensor([-0.0, 0.0])[: vocab_size - 1].repeat(vocab_size)[: vocab_size - 1]
    logits[1] = -torch.inf
    logits[2, 1] = float("nan")
    logits[3, 2] = -torch.tensor(float("nan"), dtype=dtype)
    logits[4, 0] = torch.inf
    token_ids, is_broken = numba_sampling.most_likely(logits)
    expected, also_broken = sampling.most_likely(logits)
    assert torch.equal(is_broken, also_broken)
    assert is_broken.nonzero()[:, 0].tolist() == [2, 3]
    assert torch.equal(token_ids[~is_broken], expected[~is_broken])
    assert token_ids[0] == 1
