"""Picks the implementation of each operation for a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels import numba_cpu, reference
from kernels.batch import PagedBatch
from kernels.checks import check_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Kernels:
    """The operations, checked. On the CPU decodes run in numba, prefill chunks in the reference."""

    @classmethod
    def for_device(cls, device: torch.device) -> Kernels:
        """The implementations for `device`; raises ValueError for one that has none yet."""
        if device.type != "cpu":
            message = f"device {device} has no kernels yet; use cpu"
            raise ValueError(message)
        numba_cpu.set_num_threads(torch.get_num_threads())
        return cls()

    def store_kv(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """See `kernels.reference.store_kv`."""
        reference.store_kv(key, value, key_cache, value_cache, slot_mapping)

    def copy_blocks(
        self, caches: Sequence[tuple[Tensor, Tensor]], src: Tensor, dst: Tensor
    ) -> None:
        """See `kernels.reference.copy_blocks`."""
        reference.copy_blocks(caches, src, dst)

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: PagedBatch,
        *,
        scale: float,
        sliding_window: int = 0,
        soft_cap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See `kernels.reference.paged_attention`."""
        check_attention(query, key_cache, value_cache, batch, sinks)
        num_decodes = batch.num_decodes if numba_cpu.is_supported(query.dtype) else 0
        outputs = []
        if num_decodes:
            decoded = numba_cpu.paged_decode(
                query[:num_decodes],
                key_cache,
                value_cache,
                batch,
                scale=scale,
                sliding_window=sliding_window,
                soft_cap=soft_cap,
                sinks=sinks,
            )
            outputs.append(decoded)
        if num_decodes < len(batch.context_lens):
            rest = reference.paged_attention(
                query,
                key_cache,
                value_cache,
                batch,
                scale=scale,
                sliding_window=sliding_window,
                soft_cap=soft_cap,
                sinks=sinks,
                first_sequence=num_decodes,
            )
            outputs.append(rest)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def warm_up(self, dtype: torch.dtype, k_head_dim: int, v_head_dim: int) -> None:
        """Compile what the first request would otherwise wait for."""
        one = torch.ones(1, dtype=torch.int32)
        batch = PagedBatch(
            block_tables=torch.zeros(1, 1, dtype=torch.int32),
            query_start=torch.arange(2, dtype=torch.int32),
            context_lens=one,
            slot_mapping=torch.zeros(1, dtype=torch.int64),
            num_decodes=1,
        )
        self.paged_attention(
            torch.zeros(1, 1, k_head_dim, dtype=dtype),
            torch.zeros(1, 1, 1, k_head_dim, dtype=dtype),
            torch.zeros(1, 1, 1, v_head_dim, dtype=dtype),
            batch,
            scale=1.0,
        )
