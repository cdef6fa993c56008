"""The operations on the CPU: attention and the store in numba, all else in the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import numba_attention, numba_store, reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from kernels.batch import AttentionParams, KvScales, PagedBatch


class CpuOperations:
    """Runs on as many threads as torch does."""

    def __init__(self) -> None:
        num_threads = numba_attention.set_num_threads(torch.get_num_threads())
        self.numba_attention = numba_attention.PagedAttention(num_threads)

    def store_kv(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        scales: KvScales | None,
    ) -> None:
        """See `kernels.reference.store_kv`."""
        pairs = ((key, key_cache), (value, value_cache))
        if not all(numba_store.is_supported(new, cache) for new, cache in pairs):
            reference.store_kv(key, value, key_cache, value_cache, slot_mapping, scales)
            return
        for new, cache in pairs:
            numba_store.store(new, cache, slot_mapping)

    def copy_blocks(
        self, caches: Sequence[tuple[Tensor, Tensor]], copies: Sequence[tuple[int, int]]
    ) -> None:
        """See `kernels.reference.copy_blocks`."""
        reference.copy_blocks(caches, copies)

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: PagedBatch,
        params: AttentionParams,
    ) -> Tensor:
        """See `kernels.reference.paged_attention`."""
        if not numba_attention.is_supported(key_cache, value_cache):
            return reference.paged_attention(query, key_cache, value_cache, batch, params)
        return self.numba_attention(query, key_cache, value_cache, batch, params)
