"""The CPU's small operations against plain torch: equal, but for a step of bfloat16 here and there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kernels import numba_small_ops, small_ops
from kernels.small_ops import Activation, NormStyle

if TYPE_CHECKING:
    from torch import Tensor

# Rows on either side of where a second thread joins, sizes that fill no vector.
SHAPES = [(1, 1), (3, 13), (16, 576), (64, 897), (700, 64)]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).bfloat16()


def assert_near(found: Tensor, expected: Tensor, *, least_equal: float = 0.999) -> None:
    """One step of bfloat16 at most, and nearly everywhere none."""
    assert found.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6, equal_nan=True)
    small = (found.float() - expected.float()).abs() < 1e-6
    is_equal = (found == expected) | small | found.isnan()
    assert is_equal.float().mean() >= least_equal


@pytest.mark.parametrize("style", list(NormStyle))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_norms(style: NormStyle, shape: tuple[int, int], scale: float) -> None:
    """Each style, from rows that eps outweighs to large ones."""
    x, weight = random(1, *shape, scale=scale), random(shape[1], seed=1)
    found = numba_small_ops.rms_norm(x, weight, 1e-6, style)
    assert_near(found, small_ops.rms_norm(x, weight, 1e-6, style), least_equal=0.99)


def test_norms_of_heads_and_of_strided_rows() -> None:
    """Any leading dimensions, and rows that do not lie side by side."""
    x, weight = random(1, 5, 6, 24), random(12, seed=1)
    for view in (x[..., :12], x[..., 12:].transpose(1, 2)):
        found = numba_small_ops.rms_norm(view, weight, 1e-5, NormStyle.AFTER_ROUNDING)
        assert_near(found, small_ops.rms_norm(view, weight, 1e-5, NormStyle.AFTER_ROUNDING))


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_gates(activation: Activation, shape: tuple[int, int], scale: float) -> None:
    """Each activation, near zero and where it saturates."""
    x, up = random(1, *shape, scale=scale), random(1, *shape, seed=1)
    found = numba_small_ops.gate(x, up, activation)
    assert_near(found, small_ops.gate(x, up, activation), least_equal=0.99)


@pytest.mark.parametrize("activation", list(Activation))
def test_gates_of_two_halves_of_a_product(activation: Activation) -> None:
    """Gate and up may be columns of one matrix."""
    both = random(1, 7, 40)
    found = numba_small_ops.gate(both[..., :20], both[..., 20:], activation)
    assert_near(found, small_ops.gate(both[..., :20], both[..., 20:], activation))


def test_gates_of_numbers_at_the_edge() -> None:
    """What is no number stays none, infinity and what overflows exp are as in torch."""
    edges = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -88.5, -89.5, -1e30, 1e30]
    x = torch.tensor(edges).bfloat16().view(1, 1, -1)
    for activation in Activation:
        found = numba_small_ops.gate(x, torch.ones_like(x), activation)
        expected = small_ops.gate(x, torch.ones_like(x), activation)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("num_tokens", [1, 5, 300])
@pytest.mark.parametrize("head_dim", [12, 64, 128])
def test_rotary_positions_are_equal_bit_for_bit(num_tokens: int, head_dim: int) -> None:
    """Heads as a product leaves them, and heads that are a slice of a wider product."""
    wide = random(1, num_tokens, 9, head_dim)
    query, key = wide[:, :, :7].transpose(1, 2), wide[:, :, 7:].transpose(1, 2)
    cosines, sines = (random(1, num_tokens, head_dim, seed=seed) for seed in (1, 2))
    found = numba_small_ops.rotate(query, key, cosines, sines)
    for ours, plain in zip(found, small_ops.rotate(query, key, cosines, sines), strict=True):
        assert torch.equal(ours, plain)
        assert ours.transpose(1, 2).is_contiguous()
