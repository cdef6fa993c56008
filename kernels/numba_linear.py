"""Products with bfloat16 weights for CPUs without instructions for them: float32 sums, compiled by numba.

Weights are packed once into panels of `PANEL` outputs, two registers of sums, so that a product reads them in one stream.
All rows of x go through a part of a panel, six together, before the next part does: what is widened serves six, and the
part stays in the first cache, x in the second; the loops of Goto and van de Geijn (2008, Anatomy of High-Performance
Matrix Multiplication), with a panel as a task. `kernels.reference.linear` says what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from kernels.numba_setup import njit, prange
from kernels.simd import LANES, add_outer_product, add_tile_to, prefetch, store_bf16_sum, zero_tile

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PANEL: Final = 2 * LANES
"""Outputs of a panel."""

_DEPTH = (
    512  # of a part of K: half of the first cache, of which six rows of x take the most of the rest
)
_ROWS = 48  # of x that go through a panel together
_F32, _BF16 = 4, 2  # bytes
_STRIDE_F32, _STRIDE_BF16 = PANEL * _F32, PANEL * _BF16  # bytes from one row of a panel to the next


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[num_outputs, K]` in panels, and its bias."""

    panels: Tensor  # bfloat16 [panels, K, PANEL]; outputs j and j + LANES of a panel are neighbours
    bias: Tensor  # float32 [panels * PANEL], zeros without one
    num_outputs: int
    depth: int  # K
    num_panels: int


def pack(weight: Tensor, bias: Tensor | None) -> PackedWeight:
    """Pack a weight `[N, K]`, bfloat16, and a bias `[N]`; rows of zeros fill the last panel."""
    num_outputs, depth = weight.shape
    num_panels = -(-num_outputs // PANEL)
    panels = torch.zeros(num_panels, depth, PANEL, dtype=weight.dtype)
    _fill_panels(_bits(weight.detach().contiguous()), _bits(panels))
    padded_bias = torch.zeros(num_panels * PANEL, dtype=torch.float32)
    if bias is not None:
        padded_bias[:num_outputs] = bias
    return PackedWeight(panels, padded_bias, num_outputs, depth, num_panels)


def _bits(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    return tensor.view(torch.uint16).numpy()


@njit(error_model="numpy", cache=True)
def _fill_panels(weight, panels):
    """Copy `[N, K]` to `[panels, K, PANEL]`."""
    num_outputs, depth = weight.shape
    for first in range(0, num_outputs, PANEL):
        panel = panels[first // PANEL]
        # So much of a panel at a time as stays in the first cache while each output writes its elements between others'.
        for begin in range(0, depth, _DEPTH):
            end = min(depth, begin + _DEPTH)
            for output in range(first, min(first + PANEL, num_outputs)):
                side, lane = divmod(output - first, LANES)
                column = 2 * lane + side
                for k in range(begin, end):
                    panel[k, column] = weight[output, k]


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """See `kernels.reference.linear`: `[..., K]`, bfloat16, to `[..., num_outputs]`.

    Raises:
        ValueError: when x is not bfloat16 or of another K.
    """
    if x.dtype != torch.bfloat16 or x.shape[-1] != weight.depth:
        message = f"the packed weight takes bfloat16 [..., {weight.depth}], not {x.dtype} {tuple(x.shape)}"
        raise ValueError(message)
    # Few operations: of a small product at one row, each costs as much as the product.
    wide = (x if x.is_contiguous() else x.contiguous()).float()
    out = torch.empty(*x.shape[:-1], weight.num_panels * PANEL, dtype=torch.bfloat16)
    _multiply(
        wide.data_ptr(),
        wide.numel() // weight.depth,
        weight.depth,
        weight.panels.data_ptr(),
        weight.num_panels,
        weight.bias.data_ptr(),
        out.data_ptr(),
    )
    is_whole = weight.num_panels * PANEL == weight.num_outputs
    return out if is_whole else out[..., : weight.num_outputs].contiguous()


def _panel_product(num_rows: int) -> Callable[..., None]:
    """What adds `num_rows` rows of x times a part of a panel to their sums."""
    num_vectors = 2 * num_rows

    @njit(error_model="numpy")
    def add_product(x_at, x_stride, part_at, depth, sums_at):
        tile = zero_tile(num_vectors)
        for k in range(depth):
            offset = k * _STRIDE_BF16
            # The next part, while this one is multiplied: between few rows the processor would wait for it.
            prefetch(part_at + depth * _STRIDE_BF16 + offset)
            tile = add_outer_product(tile, x_at + k * _F32, x_stride, part_at + offset)
        add_tile_to(tile, sums_at, _STRIDE_F32)

    return add_product  # type: ignore[no-any-return]


# Twelve sums, two vectors of a panel, a number of x and the mask that widens: all sixteen registers of AVX2.
_add_six, _add_four, _add_two, _add_one = (_panel_product(rows) for rows in (6, 4, 2, 1))


@njit(error_model="numpy")
def _add_rows(x_at, num_rows, x_stride, part_at, depth, sums_at):
    row = 0
    while row < num_rows:
        x_row, sums_row = x_at + row * x_stride, sums_at + row * _STRIDE_F32
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
def _round_rows(sums_at, bias_at, out_at, out_stride, num_rows):
    for row in range(num_rows):
        for column in range(0, PANEL, LANES):
            store_bf16_sum(
                sums_at + row * _STRIDE_F32 + column * _F32,
                bias_at + column * _F32,
                out_at + row * out_stride + column * _BF16,
            )


@njit(error_model="numpy")
def _multiply_panel(x_at, num_rows, depth, panel_at, bias_at, out_at, out_stride):
    x_stride = depth * _F32
    sums = np.empty(_ROWS * PANEL, np.float32)
    sums_at = sums.ctypes.data
    for row in range(0, num_rows, _ROWS):
        rows = min(_ROWS, num_rows - row)
        sums[: rows * PANEL] = 0
        for begin in range(0, depth, _DEPTH):
            part = min(_DEPTH, depth - begin)
            x_part = x_at + row * x_stride + begin * _F32
            _add_rows(x_part, rows, x_stride, panel_at + begin * _STRIDE_BF16, part, sums_at)
        _round_rows(sums_at, bias_at, out_at + row * out_stride, out_stride, rows)


@njit(parallel=True, error_model="numpy", cache=True)
def _multiply(x_at, num_rows, depth, panels_at, num_panels, bias_at, out_at):
    for panel in prange(num_panels):
        _multiply_panel(
            x_at,
            num_rows,
            depth,
            panels_at + panel * depth * _STRIDE_BF16,
            bias_at + panel * _STRIDE_F32,
            out_at + panel * _STRIDE_BF16,
            num_panels * _STRIDE_BF16,
        )
