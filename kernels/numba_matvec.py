"""The product of one row with a packed weight, as fast as memory gives it; see `kernels.numba_linear`.

A row alone has two sums a panel, each waiting for the one before it. Panels that run together have more, and are as many
streams for the processor to read ahead in: it does so by itself, and better than it can be told. Each sum is made in the
order in which it is made beside other rows.
"""

from __future__ import annotations

import numpy as np

from kernels.numba_panels import DEPTH, F32, PANEL, STRIDE_BF16, STRIDE_F32, round_rows
from kernels.numba_scalars import bf16_pointer, widen
from kernels.numba_setup import carray, njit, prange
from kernels.simd import add_outer_product, add_tile_to, zero_tile

_TOGETHER = 4  # panels, as many as `_add_four` spells out


@njit(error_model="numpy")
def _add_four(x_at, part_at, stride, depth, sums_at):
    """Add x times a part of four panels, `stride` bytes apart, to their sums."""
    first, second, third, fourth = zero_tile(2), zero_tile(2), zero_tile(2), zero_tile(2)
    for k in range(depth):
        x, w = x_at + k * F32, part_at + k * STRIDE_BF16
        first = add_outer_product(first, x, 0, w)
        second = add_outer_product(second, x, 0, w + stride)
        third = add_outer_product(third, x, 0, w + 2 * stride)
        fourth = add_outer_product(fourth, x, 0, w + 3 * stride)
    add_tile_to(first, sums_at, 0)
    add_tile_to(second, sums_at + STRIDE_F32, 0)
    add_tile_to(third, sums_at + 2 * STRIDE_F32, 0)
    add_tile_to(fourth, sums_at + 3 * STRIDE_F32, 0)


@njit(error_model="numpy")
def _add_one(x_at, part_at, depth, sums_at):
    tile = zero_tile(2)
    for k in range(depth):
        tile = add_outer_product(tile, x_at + k * F32, 0, part_at + k * STRIDE_BF16)
    add_tile_to(tile, sums_at, 0)


@njit(error_model="numpy")
def _multiply_panels(x_at, depth, panels_at, num_panels, bias_at, out_at):
    """Of at most `_TOGETHER` panels."""
    stride = depth * STRIDE_BF16
    sums = np.zeros(_TOGETHER * PANEL, np.float32)
    sums_at = sums.ctypes.data
    for begin in range(0, depth, DEPTH):
        part = min(DEPTH, depth - begin)
        x_part, part_at = x_at + begin * F32, panels_at + begin * STRIDE_BF16
        if num_panels == _TOGETHER:
            _add_four(x_part, part_at, stride, part, sums_at)
        else:
            for panel in range(num_panels):
                _add_one(x_part, part_at + panel * stride, part, sums_at + panel * STRIDE_F32)
    for panel in range(num_panels):
        shift = panel * STRIDE_F32
        round_rows(sums_at + shift, bias_at + shift, out_at + panel * STRIDE_BF16, 0, 1)
    # An address does not keep its array.
    sums[0] = 0


@njit(parallel=True, error_model="numpy", cache=True)
def multiply_row(x_at, depth, panels_at, num_panels, bias_at, out_at):
    """Write x, bfloat16 `[depth]`, times a weight in panels, and its bias."""
    x = carray(bf16_pointer(x_at), depth)
    wide = np.empty(depth, np.float32)
    wide_at = wide.ctypes.data
    for k in range(depth):
        wide[k] = widen(x[k])
    for group in prange(-(-num_panels // _TOGETHER)):
        panel = group * _TOGETHER
        _multiply_panels(
            wide_at,
            depth,
            panels_at + panel * depth * STRIDE_BF16,
            min(_TOGETHER, num_panels - panel),
            bias_at + panel * STRIDE_F32,
            out_at + panel * STRIDE_BF16,
        )
    wide[0] = 0
