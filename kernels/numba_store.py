"""Storing new keys and values on the CPU, compiled by numba: for a step's few rows torch's calls cost more than the copy.

`kernels.reference.store_kv` says what is stored. One thread copies: new rows are few beside what attention reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.numba_rows import copy_bytes, int64_at
from kernels.numba_setup import njit

if TYPE_CHECKING:
    import torch


@njit(cache=True, error_model="numpy")
def store_heads(source, token_stride, head_stride, cache, slots, num_tokens, num_heads, size):
    """Copy heads of `size` bytes to their slots; strides are in bytes too."""
    for token in range(num_tokens):
        slot = int64_at(slots, token)
        if slot < 0:
            continue
        for head in range(num_heads):
            row = source + token * token_stride + head * head_stride
            copy_bytes(cache + (slot * num_heads + head) * size, row, size)


def is_supported(new: torch.Tensor, cache: torch.Tensor) -> bool:
    """Whether `new` only has to be copied: what is converted on the way goes through the reference."""
    return new.dtype == cache.dtype and new.stride(2) == 1


def store(new: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write rows `[T, num_kv_heads, head_dim]` into the slots of a contiguous cache of their dtype; -1 is left out."""
    num_tokens, num_heads, dim = new.shape
    assert cache.is_contiguous()
    slots, width = slot_mapping.contiguous(), new.itemsize
    token_stride, head_stride = new.stride(0) * width, new.stride(1) * width
    places = (new.data_ptr(), token_stride, head_stride, cache.data_ptr(), slots.data_ptr())
    store_heads(*places, num_tokens, num_heads, dim * width)
