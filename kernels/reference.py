"""The specification of each operation, in plain torch; on the CPU also what runs float16 and fp8.

Caches of a layer are `[num_blocks, block_size, num_kv_heads, head_dim]`; K and V may differ in head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.checks import FP8

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from kernels.batch import AttentionParams, KvScales, PagedBatch

E4M3_MAX = 448.0


def store_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    scales: KvScales | None = None,
) -> None:
    """Write new keys `[T, num_kv_heads, k_head_dim]` and values into their slots (int64 `[T]`, -1 is left out).

    An fp8 cache (float8_e4m3fn) holds what is stored divided by its head's scale, rounded to nearest, clipped to +-448.
    """
    kept = slot_mapping >= 0
    if not bool(kept.all()):
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    key_scale, value_scale = _each(scales)
    for new, cache, scale in ((key, key_cache, key_scale), (value, value_cache, value_scale)):
        elements = new.to(cache.dtype) if scale is None else _to_fp8(new, scale)
        # torch moves no fp8 by index, but the bytes behind it.
        kind = torch.uint8 if cache.dtype == FP8 else cache.dtype
        slots = cache.view(kind).view(-1, *cache.shape[2:])
        slots.index_copy_(0, slot_mapping, elements.view(kind))


def _each(scales: KvScales | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if scales is None else (scales.key, scales.value)


def _to_fp8(new: Tensor, scale: Tensor) -> Tensor:
    return (new.float() / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(FP8)


def copy_blocks(caches: Sequence[tuple[Tensor, Tensor]], copies: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks, each (source, destination), in every layer; no block is both in one call."""
    device = caches[0][0].device
    src, dst = torch.tensor(copies, dtype=torch.int64, device=device).unbind(1)
    for layer in caches:
        for cache in layer:
            bits = cache.view(torch.uint8)
            bits.index_copy_(0, dst, bits.index_select(0, src))


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: PagedBatch,
    params: AttentionParams,
) -> Tensor:
    """Causal attention of packed queries over the blocks of their sequences.

    For the query at position i, over keys j in `(i - sliding_window, i]` (all j <= i without a window):

        s_j = soft_cap * tanh(scale * q . k_j / soft_cap)      (just scale * q . k_j without a cap)
        out = sum_j exp(s_j) v_j / (exp(sink) + sum_j exp(s_j))    (no sink term without sinks)

    Args:
        query: `[T, num_heads, k_head_dim]`, float32, bfloat16 or float16; num_heads is a multiple of num_kv_heads, and
            query head h reads kv head `h * num_kv_heads // num_heads`.
        key_cache: `[num_blocks, block_size, num_kv_heads, k_head_dim]`, in the dtype of `query` or fp8 with scales.
        value_cache: the same with v_head_dim.
        batch: which tokens are whose.
        params: scale, window, cap, sinks, fp8 scales.

    Returns:
        `[T, num_heads, v_head_dim]` in the dtype of `query`.
    """
    starts, lengths = batch.query_start.tolist(), batch.context_lens.tolist()
    key_scale, value_scale = _each(params.kv_scales)
    outputs = [
        _attend(
            query[starts[index] : starts[index + 1]],
            _gather(key_cache, batch.block_tables[index], lengths[index], key_scale),
            _gather(value_cache, batch.block_tables[index], lengths[index], value_scale),
            params,
        )
        for index in range(len(lengths))
    ]
    return torch.cat(outputs)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product x W^T + bias, summed in float32: x `[..., K]`, W `[N, K]`, result `[..., N]` in the dtype of x."""
    total = x.float() @ weight.float().T
    return (total if bias is None else total + bias.float()).to(x.dtype)


def _gather(cache: Tensor, table: Tensor, length: int, scale: Tensor | None) -> Tensor:
    """`[num_kv_heads, length, head_dim]` in float32."""
    block_size = cache.shape[1]
    bits = cache.view(torch.uint8) if cache.dtype == FP8 else cache
    blocks = bits.index_select(0, table[: -(-length // block_size)].long()).view(cache.dtype)
    found = blocks.flatten(0, 1)[:length].transpose(0, 1).float()
    return found if scale is None else found * scale[:, None, None]


def _attend(query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
    """One sequence: `[q, num_heads, k_head_dim]` over keys and values `[num_kv_heads, n, head_dim]`."""
    num_queries, num_heads, _ = query.shape
    num_kv_heads, length, v_head_dim = values.shape
    grouped = query.float().transpose(0, 1).reshape(num_kv_heads, -1, query.shape[2])
    scores = (grouped @ keys.transpose(1, 2)).view(num_heads, num_queries, length) * params.scale
    if params.soft_cap:
        scores = params.soft_cap * torch.tanh(scores / params.soft_cap)
    scores.masked_fill_(
        _hidden(num_queries, length, params.sliding_window, query.device), -torch.inf
    )
    if params.sinks is not None:
        column = params.sinks.float().view(-1, 1, 1).expand(-1, num_queries, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :length]
    weighed = weights.reshape(num_kv_heads, -1, length) @ values
    return weighed.view(num_heads, num_queries, v_head_dim).transpose(0, 1).to(query.dtype)


def _hidden(num_queries: int, length: int, sliding_window: int, device: torch.device) -> Tensor:
    """Which of `length` keys each of the last `num_queries` positions does not see, bool `[q, n]`."""
    keys = torch.arange(length, device=device)
    queries = keys[length - num_queries :, None]
    hidden = keys > queries
    return hidden | (keys <= queries - sliding_window) if sliding_window else hidden
