"""What every implementation of an operation may rely on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from kernels.batch import AttentionParams, KvScales, PagedBatch

FP8: Final = torch.float8_e4m3fn


def check_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: PagedBatch,
    params: AttentionParams,
) -> None:
    """Raise `ValueError` when shapes or dtypes do not fit together."""
    num_tokens, num_heads, k_head_dim = query.shape
    num_kv_heads, sinks = key_cache.shape[2], params.sinks
    _check_caches(key_cache, value_cache)
    if key_cache.shape[3] != k_head_dim:
        _fail(f"queries have head_dim {k_head_dim}, keys {key_cache.shape[3]}")
    if num_heads % num_kv_heads:
        _fail(f"{num_heads} query heads are not a multiple of {num_kv_heads} kv heads")
    if key_cache.dtype not in (query.dtype, FP8):
        _fail(f"dtypes differ: queries {query.dtype}, caches {key_cache.dtype}")
    if params.scale <= 0 or params.soft_cap < 0 or params.sliding_window < 0:
        _fail(f"a scale above 0, a cap and a window of at least 0 are needed, not {params}")
    if batch.slot_mapping.shape != (num_tokens,):
        _fail(f"{num_tokens} tokens, but slots {tuple(batch.slot_mapping.shape)}")
    if sinks is not None and sinks.shape != (num_heads,):
        _fail(f"{num_heads} query heads, but sinks {tuple(sinks.shape)}")
    _check_scales(key_cache, params.kv_scales)


def check_store(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    scales: KvScales | None,
) -> None:
    """Raise `ValueError` when shapes or dtypes do not fit together."""
    _check_caches(key_cache, value_cache)
    for new, cache in ((key, key_cache), (value, value_cache)):
        if new.shape != (*slot_mapping.shape, *cache.shape[2:]):
            _fail(
                f"{tuple(new.shape)} new elements do not fit {slot_mapping.numel()} slots of {tuple(cache.shape)}"
            )
    _check_scales(key_cache, scales)


def check_copies(copies: Sequence[tuple[int, int]], num_blocks: int) -> None:
    """Raise `ValueError` unless the copies (source, destination) may be made in any order, or all at once."""
    sources, destinations = {src for src, _ in copies}, [dst for _, dst in copies]
    if len(set(destinations)) < len(destinations):
        _fail("two copies of one call have the same destination")
    if both := sources & set(destinations):
        _fail(f"block {min(both)} is source and destination of one call's copies")
    for block in (*sources, *destinations):
        if not 0 <= block < num_blocks:
            _fail(f"there is no block {block}: the pool has {num_blocks}")


def _check_caches(key_cache: Tensor, value_cache: Tensor) -> None:
    if key_cache.shape[:3] != value_cache.shape[:3]:
        _fail(
            f"caches {tuple(key_cache.shape)} and {tuple(value_cache.shape)} differ in blocks or heads"
        )
    if key_cache.dtype != value_cache.dtype:
        _fail(f"dtypes differ: keys {key_cache.dtype}, values {value_cache.dtype}")
    block_size = key_cache.shape[1]
    if block_size & (block_size - 1):
        _fail(f"block_size {block_size} is not a power of two")


def _check_scales(key_cache: Tensor, scales: KvScales | None) -> None:
    if (scales is not None) != (key_cache.dtype == FP8):
        _fail(f"an fp8 cache, and only that, needs scales; this one is {key_cache.dtype}")
    if scales is not None:
        for scale in (scales.key, scales.value):
            if scale.shape != (key_cache.shape[2],) or scale.dtype != torch.float32:
                _fail(
                    f"scales are float32 [{key_cache.shape[2]}], not {scale.dtype} {tuple(scale.shape)}"
                )


def _fail(message: str) -> NoReturn:
    raise ValueError(message)
