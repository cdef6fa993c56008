"""The operations on the CPU: decodes in numba, all else in the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import numba_cpu, reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from kernels.batch import AttentionParams, KvScales, PagedBatch


class CpuOperations:
    """Runs on as many threads as torch does."""

    def __init__(self) -> None:
        numba_cpu.set_num_threads(torch.get_num_threads())

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
        reference.store_kv(key, value, key_cache, value_cache, slot_mapping, scales)

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
        num_decodes = batch.num_decodes if numba_cpu.is_supported(key_cache.dtype) else 0
        outputs = []
        if num_decodes:
            decodes = query[:num_decodes]
            outputs.append(numba_cpu.paged_decode(decodes, key_cache, value_cache, batch, params))
        if num_decodes < len(batch.context_lens):
            rest = reference.paged_attention(
                query, key_cache, value_cache, batch, params, first_sequence=num_decodes
            )
            outputs.append(rest)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
