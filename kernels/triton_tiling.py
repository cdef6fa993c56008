"""Sizes that a kernel is compiled with, for each target: chosen by hand, checked by `tools/compile_kernels.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Target = Literal["sm_80", "sm_90", "gfx942"]

MIN_DOT: Final = 16  # least rows and depth of a product on the tensor cores
_WIDE_DIM: Final = 128
_FLOAT32_BYTES: Final = 4
_MANY_ROWS: Final = 64
_TILE_BYTES: Final = (
    32 << 10
)  # of keys and values: two or three such tiles a program hide the memory's latency
_WAVES: Final = (
    8  # programs for each multiprocessor, so that the last ones to end leave few of them idle
)


@dataclass(frozen=True, slots=True)
class Dims:
    """What decides how large tiles may be."""

    k_dim: int
    v_dim: int
    group: int  # query heads that share a kv head
    element_size: int  # bytes of a query's element
    cache_element_size: int  # 1: fp8

    @property
    def widest(self) -> int:
        """The larger head, as it is computed."""
        return max(padded(self.k_dim), padded(self.v_dim))


@dataclass(frozen=True, slots=True)
class Tiling:
    """Rows of queries and of keys that a program holds at once, and how it is compiled."""

    tile_rows: int
    tile_keys: int
    num_warps: int
    num_stages: int  # tiles of keys in flight


def padded(dim: int) -> int:
    """The power of two that `dim` elements are computed as."""
    return max(MIN_DOT, 1 << (dim - 1).bit_length())


def _floor_power(count: int) -> int:
    return 1 << (count.bit_length() - 1)


def decode_tiling(target: Target, dims: Dims) -> Tiling:
    """For `kernels.triton_decode`; as `prefill_tiling`, the largest tiles that no compiler spills."""
    row_bytes = (padded(dims.k_dim) + padded(dims.v_dim)) * dims.element_size
    # float32 is computed without tensor cores, from many registers.
    is_float32 = dims.element_size >= _FLOAT32_BYTES
    tile_bytes = _TILE_BYTES // 2 if is_float32 else _TILE_BYTES
    tile_keys = min(64, max(MIN_DOT, _floor_power(tile_bytes // row_bytes)))
    rows = padded(dims.group)
    has_many_rows = rows >= _MANY_ROWS
    # Tiles of fp8 are half as large: one more is in flight.
    stages = 2 if target == "gfx942" else (4 if dims.cache_element_size == 1 else 3)
    if is_float32 and has_many_rows:
        stages = 1
    return Tiling(rows, tile_keys, num_warps=8 if has_many_rows else 4, num_stages=stages)


def prefill_tiling(target: Target, dims: Dims) -> Tiling:
    """For `kernels.triton_prefill`: the largest tiles that no compiler spills."""
    is_wide = dims.widest > _WIDE_DIM
    if dims.element_size >= _FLOAT32_BYTES:
        rows = 16 if is_wide else 32
        return Tiling(max(rows, padded(dims.group)), 16, num_warps=8, num_stages=1)
    # Converting fp8 takes registers too.
    is_fp8 = dims.cache_element_size == 1
    if target == "sm_90":
        rows, keys = 64 if is_wide and is_fp8 else 128, 32 if is_wide else 64
    else:
        rows, keys = 64 if is_wide else 128, 64 if dims.widest < _WIDE_DIM else 32
    stages = 2 if target == "gfx942" or is_wide or is_fp8 else 3
    return Tiling(max(rows, padded(dims.group)), keys, num_warps=8, num_stages=stages)


def num_parts(num_programs: int, num_multiprocessors: int, most: int) -> int:
    """Parts that each context is split into, at `most`, so that `num_programs` without a split fill the device."""
    wanted = -(-num_multiprocessors * _WAVES // num_programs)
    return max(1, min(wanted, most))
