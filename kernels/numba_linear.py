"""Products with bfloat16 weights for CPUs without instructions for them: float32 sums, compiled by numba.

Weights are packed once into panels of `PANEL` outputs, two registers of sums, so that a product reads them in one stream.
All rows of x go through a part of a panel, six together, before the next part does: what is widened serves six, and the
part stays in the first cache, x in the second; the loops of Goto and van de Geijn (2008, Anatomy of High-Performance
Matrix Multiplication), with a panel as a task. `kernels.reference.linear` says what is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kernels.numba_matvec import multiply_row
from kernels.numba_panels import (
    DEPTH,
    F32,
    PANEL,
    STRIDE_BF16,
    STRIDE_F32,
    PackedWeight,
    pack,
    round_rows,
)
from kernels.numba_setup import njit, prange
from kernels.simd import add_outer_product, add_tile_to, prefetch, zero_tile

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["PackedWeight", "linear", "pack"]

_ROWS = 48  # of x that go through a panel together


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """See `kernels.reference.linear`: `[..., K]`, bfloat16, to `[..., num_outputs]`.

    Raises:
        ValueError: when x is not bfloat16 or of another K.
    """
    if x.dtype != torch.bfloat16 or x.shape[-1] != weight.depth:
        message = f"the packed weight takes bfloat16 [..., {weight.depth}], not {x.dtype} {tuple(x.shape)}"
        raise ValueError(message)
    # Few operations: of a small product at one row, each costs as much as the product.
    x = x if x.is_contiguous() else x.contiguous()
    out = torch.empty(*x.shape[:-1], weight.num_panels * PANEL, dtype=torch.bfloat16)
    num_rows = x.numel() // weight.depth
    places = (weight.panels_at, weight.num_panels, weight.bias_at, out.data_ptr())
    if num_rows == 1:
        multiply_row(x.data_ptr(), weight.depth, *places)
    else:
        wide = x.float()
        multiply(wide.data_ptr(), num_rows, weight.depth, *places)
    is_whole = weight.num_panels * PANEL == weight.num_outputs
    return out if is_whole else out[..., : weight.num_outputs].contiguous()


def _panel_product(num_rows: int) -> Callable[..., None]:
    """What adds `num_rows` rows of x times a part of a panel to their sums."""
    num_vectors = 2 * num_rows

    @njit(error_model="numpy")
    def add_product(x_at, x_stride, part_at, depth, sums_at):
        tile = zero_tile(num_vectors)
        for k in range(depth):
            offset = k * STRIDE_BF16
            # The next part, while this one is multiplied: between few rows the processor would wait for it.
            prefetch(part_at + depth * STRIDE_BF16 + offset)
            tile = add_outer_product(tile, x_at + k * F32, x_stride, part_at + offset)
        add_tile_to(tile, sums_at, STRIDE_F32)

    return add_product  # type: ignore[no-any-return]


# Twelve sums, two vectors of a panel, a number of x and the mask that widens: all sixteen registers of AVX2.
_add_six, _add_four, _add_two, _add_one = (_panel_product(rows) for rows in (6, 4, 2, 1))


@njit(error_model="numpy")
def _add_rows(x_at, num_rows, x_stride, part_at, depth, sums_at):
    row = 0
    while row < num_rows:
        x_row, sums_row = x_at + row * x_stride, sums_at + row * STRIDE_F32
        rest = num_rows - row
        if rest >= 6:  # noqa: PLR2004 -- the rows that the next line takes
            _add_six(x_row, x_stride, part_at, depth, sums_row)
            row += 6
        elif rest >= 4:  # noqa: PLR2004 -- as above
            _add_four(x_row, x_stride, part_at, depth, sums_row)
            row += 4
        elif rest >= 2:  # noqa: PLR2004 -- as above
            _add_two(x_row, x_stride, part_at, depth, sums_row)
            row += 2
        else:
            _add_one(x_row, x_stride, part_at, depth, sums_row)
            row += 1


@njit(error_model="numpy")
def _multiply_panel(x_at, num_rows, depth, panel_at, bias_at, out_at, out_stride):
    x_stride = depth * F32
    sums = np.empty(_ROWS * PANEL, np.float32)
    sums_at = sums.ctypes.data
    for row in range(0, num_rows, _ROWS):
        rows = min(_ROWS, num_rows - row)
        sums[: rows * PANEL] = 0
        for begin in range(0, depth, DEPTH):
            part = min(DEPTH, depth - begin)
            x_part = x_at + row * x_stride + begin * F32
            _add_rows(x_part, rows, x_stride, panel_at + begin * STRIDE_BF16, part, sums_at)
        round_rows(sums_at, bias_at, out_at + row * out_stride, out_stride, rows)


@njit(parallel=True, error_model="numpy", cache=True)
def multiply(x_at, num_rows, depth, panels_at, num_panels, bias_at, out_at):
    for panel in prange(num_panels):
        _multiply_panel(
            x_at,
            num_rows,
            depth,
            panels_at + panel * depth * STRIDE_BF16,
            bias_at + panel * STRIDE_F32,
            out_at + panel * STRIDE_BF16,
            num_panels * STRIDE_BF16,
        )
