"""Weights packed into panels of outputs, as `kernels.numba_linear` and `kernels.numba_matvec` multiply by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from kernels.numba_setup import njit
from kernels.simd import LANES, store_bf16_sum

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PANEL: Final = 2 * LANES
"""Outputs of a panel."""

DEPTH: Final = 512
"""Of a part of K: half of the first cache, of which six rows of x take the most of the rest."""

F32: Final = 4  # bytes
BF16: Final = 2
STRIDE_F32: Final = PANEL * F32  # from one row of a panel to the next
STRIDE_BF16: Final = PANEL * BF16


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[num_outputs, K]` in panels, and its bias."""

    panels: Tensor  # bfloat16 [panels, K, PANEL]; outputs j and j + LANES of a panel are neighbours
    bias: Tensor  # float32 [panels * PANEL], zeros without one
    num_outputs: int
    depth: int  # K
    num_panels: int
    panels_at: int  # addresses
    bias_at: int


def pack(weight: Tensor, bias: Tensor | None) -> PackedWeight:
    """Pack a weight `[N, K]`, bfloat16, and a bias `[N]`; rows of zeros fill the last panel."""
    num_outputs, depth = weight.shape
    num_panels = -(-num_outputs // PANEL)
    panels = torch.zeros(num_panels, depth, PANEL, dtype=weight.dtype)
    _fill_panels(_bits(weight.detach().contiguous()), _bits(panels))
    padded_bias = torch.zeros(num_panels * PANEL, dtype=torch.float32)
    if bias is not None:
        padded_bias[:num_outputs] = bias
    addresses = (panels.data_ptr(), padded_bias.data_ptr())
    return PackedWeight(panels, padded_bias, num_outputs, depth, num_panels, *addresses)


def _bits(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    return tensor.view(torch.uint16).numpy()


@njit(error_model="numpy", cache=True)
def _fill_panels(weight, panels):
    """Copy `[N, K]` to `[panels, K, PANEL]`."""
    num_outputs, depth = weight.shape
    for first in range(0, num_outputs, PANEL):
        panel = panels[first // PANEL]
        # So much of a panel at a time as stays in the first cache while each output writes its elements between others'.
        for begin in range(0, depth, DEPTH):
            end = min(depth, begin + DEPTH)
            for output in range(first, min(first + PANEL, num_outputs)):
                side, lane = divmod(output - first, LANES)
                column = 2 * lane + side
                for k in range(begin, end):
                    panel[k, column] = weight[output, k]


@njit(error_model="numpy")
def round_rows(sums_at, bias_at, out_at, out_stride, num_rows):
    """Write `num_rows` rows of a panel's sums and its bias as bfloat16, `out_stride` bytes apart."""
    for row in range(num_rows):
        for column in range(0, PANEL, LANES):
            store_bf16_sum(
                sums_at + row * STRIDE_F32 + column * F32,
                bias_at + column * F32,
                out_at + row * out_stride + column * BF16,
            )
