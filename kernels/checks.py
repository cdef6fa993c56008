"""What every implementation of an operation may rely on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.batch import PagedBatch


def check_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: PagedBatch, sinks: Tensor | None
) -> None:
    """Raise `ValueError` when shapes or dtypes do not fit together."""
    num_tokens, num_heads, k_head_dim = query.shape
    num_kv_heads = key_cache.shape[2]
    if key_cache.shape[:3] != value_cache.shape[:3]:
        _fail(
            f"caches {tuple(key_cache.shape)} and {tuple(value_cache.shape)} differ in blocks or heads"
        )
    if key_cache.shape[3] != k_head_dim:
        _fail(f"queries have head_dim {k_head_dim}, keys {key_cache.shape[3]}")
    if num_heads % num_kv_heads:
        _fail(f"{num_heads} query heads are not a multiple of {num_kv_heads} kv heads")
    if query.dtype != key_cache.dtype or key_cache.dtype != value_cache.dtype:
        _fail(f"dtypes differ: {query.dtype}, {key_cache.dtype}, {value_cache.dtype}")
    if batch.slot_mapping.shape != (num_tokens,):
        _fail(f"{num_tokens} tokens, but slots {tuple(batch.slot_mapping.shape)}")
    if sinks is not None and sinks.shape != (num_heads,):
        _fail(f"{num_heads} query heads, but sinks {tuple(sinks.shape)}")


def _fail(message: str) -> None:
    raise ValueError(message)
