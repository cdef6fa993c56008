"""Whether a replacement gives what the original gives, on numbers that would show a difference."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

STEP_OF_BF16: Final = 2**-7
"""As a share, at most."""

_SCALES: Final = (1e-4, 1e-2, 1.0, 30.0)  # of random rows: the smallest shows what eps does
_NOISE: Final = 1e-6
_LEAST_EQUAL: Final = 0.99  # another order of rounding differs in tens of percent


def agree(found: Tensor, expected: Tensor, noise: float = _NOISE) -> bool:
    """Equal but for a step of bfloat16, or `noise`, here and there; below a millionth the original is but rounding."""
    if found.shape != expected.shape or found.dtype is not expected.dtype:
        return False
    is_near = torch.allclose(found.float(), expected.float(), rtol=STEP_OF_BF16, atol=noise)
    is_equal = (found == expected) | (found.float() - expected.float()).abs().lt(_NOISE)
    return is_near and float(is_equal.float().mean()) >= _LEAST_EQUAL


def random_rows(size: int) -> Tensor:
    """bfloat16 `[1, rows, size]`, rows of different sizes of numbers."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 4 * len(_SCALES), size, generator=generator)
    return (rows * torch.tensor(_SCALES).repeat(4)[:, None]).bfloat16()
