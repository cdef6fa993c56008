"""Products with packed weights are what the reference says, for all shapes."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from kernels import numba_linear, reference

# Rows: each size of a group of rows, what remains of groups, more than go through a panel together.
ROWS = (1, 2, 3, 4, 5, 6, 7, 11, 16, 64, 97, 200)
# Outputs: less than a panel, whole panels, a rest; a task's panels and more. K: odd, of two parts and a rest.
OUTPUTS_AND_DEPTHS = ((1, 5), (16, 1), (33, 1100), (100, 37), (130, 2049), (320, 64))


def _random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).bfloat16()


def _check(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Half a step of bfloat16 from the exact result, and the rounding of a sum in float32."""
    exact = x.double() @ weight.double().T + bias.double()
    magnitude = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    allowed = exact.abs() * 2**-8 + magnitude * 2**-20
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize(("num_outputs", "depth"), OUTPUTS_AND_DEPTHS)
def test_a_product_is_exact_up_to_rounding(num_outputs: int, depth: int) -> None:
    """With a bias and without, for every number of rows."""
    weight = _random(num_outputs, depth)
    for num_rows, bias in product(ROWS, (None, _random(num_outputs))):
        x = _random(num_rows, depth)
        exact_bias = torch.zeros(num_outputs) if bias is None else bias
        _check(numba_linear.linear(x, numba_linear.pack(weight, bias)), x, weight, exact_bias)
        _check(reference.linear(x, weight, bias), x, weight, exact_bias)


def test_rows_may_lie_apart_and_in_several_dimensions() -> None:
    """Neither x nor the weight needs to be contiguous."""
    x, weight = _random(2, 6, 96)[:, ::2, 16:80], _random(64, 48).T
    found = numba_linear.linear(x, numba_linear.pack(weight, None))
    _check(found, x, weight, torch.zeros(48))


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """Bit for bit: a row's sums are made in the same order beside any others."""
    x, packed = _random(13, 1500), numba_linear.pack(_random(50, 1500), None)
    together = numba_linear.linear(x, packed)
    for row in range(13):
        assert torch.equal(numba_linear.linear(x[row : row + 1], packed)[0], together[row])


def test_what_is_no_number_stays_none() -> None:
    """Rounding makes no number of a NaN, and infinities stay."""
    x = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [1.0]]).bfloat16()
    found = numba_linear.linear(x, numba_linear.pack(torch.ones(3, 1).bfloat16(), None))
    assert torch.equal(found[1:], x[1:].expand(3, 3))
    assert bool(found[0].isnan().all())


def test_no_rows_give_no_rows() -> None:
    """A step may ask for no logits."""
    packed = numba_linear.pack(_random(20, 8), None)
    assert numba_linear.linear(_random(1, 8)[:0], packed).shape == (0, 20)


@pytest.mark.parametrize("x", [torch.zeros(2, 8), torch.zeros(2, 9).bfloat16()])
def test_what_does_not_fit_is_refused(x: torch.Tensor) -> None:
    """Other dtypes and other sizes, in one sentence."""
    packed = numba_linear.pack(_random(20, 8), None)
    with pytest.raises(ValueError, match=r"takes bfloat16 \[\.\.\., 8\]"):
        numba_linear.linear(x, packed)
