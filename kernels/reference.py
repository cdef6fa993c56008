"""The specification of each operation, in plain torch; on the CPU also what runs prefill chunks.

Caches of a layer are `[num_blocks, block_size, num_kv_heads, head_dim]`; K and V may differ in head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from kernels.batch import PagedBatch


def store_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write new keys `[T, num_kv_heads, k_head_dim]` and values into their slots (int64 `[T]`, -1 is left out)."""
    kept = slot_mapping >= 0
    if not bool(kept.all()):
        key, value, slot_mapping = key[kept], value[kept], slot_mapping[kept]
    key_cache.view(-1, *key_cache.shape[2:]).index_copy_(0, slot_mapping, key.to(key_cache.dtype))
    value_cache.view(-1, *value_cache.shape[2:]).index_copy_(
        0, slot_mapping, value.to(value_cache.dtype)
    )


def copy_blocks(caches: Sequence[tuple[Tensor, Tensor]], src: Tensor, dst: Tensor) -> None:
    """Copy whole blocks, src[i] to dst[i] (int64 `[n]`), in every layer; all are read before any is written."""
    for layer in caches:
        for cache in layer:
            cache.index_copy_(0, dst, cache.index_select(0, src))


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    first_sequence: int = 0,
) -> Tensor:
    """Causal attention of packed queries over the blocks of their sequences.

    For the query at position i, over keys j in `(i - sliding_window, i]` (all j <= i without a window):

        s_j = soft_cap * tanh(scale * q . k_j / soft_cap)      (just scale * q . k_j without a cap)
        out = sum_j exp(s_j) v_j / (exp(sink) + sum_j exp(s_j))    (no sink term without sinks)

    Args:
        query: `[T, num_heads, k_head_dim]`, float32, bfloat16 or float16; num_heads is a multiple of num_kv_heads, and
            query head h reads kv head `h * num_kv_heads // num_heads`.
        key_cache: `[num_blocks, block_size, num_kv_heads, k_head_dim]`.
        value_cache: the same with v_head_dim.
        batch: which tokens are whose.
        scale: factor of the dot product.
        sliding_window: tokens that a query sees, itself included; 0: all.
        soft_cap: 0: none.
        sinks: `[num_heads]` logits that take part in the softmax and weigh nothing.
        first_sequence: sequences before it are left out.

    Returns:
        `[tokens of the sequences taken, num_heads, v_head_dim]` in the dtype of `query`.
    """
    starts, lengths = batch.query_start.tolist(), batch.context_lens.tolist()
    outputs = [
        _attend(
            query[starts[index] : starts[index + 1]],
            _gather(key_cache, batch.block_tables[index], lengths[index]),
            _gather(value_cache, batch.block_tables[index], lengths[index]),
            scale,
            sliding_window,
            soft_cap,
            sinks,
        )
        for index in range(first_sequence, len(lengths))
    ]
    return torch.cat(outputs)


def _gather(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """`[num_kv_heads, length, head_dim]` in float32."""
    block_size = cache.shape[1]
    blocks = cache.index_select(0, table[: -(-length // block_size)].long())
    return blocks.flatten(0, 1)[:length].transpose(0, 1).float()


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    sliding_window: int,
    soft_cap: float,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence: `[q, num_heads, k_head_dim]` over keys and values `[num_kv_heads, n, head_dim]`."""
    num_queries, num_heads, _ = query.shape
    num_kv_heads, length, v_head_dim = values.shape
    grouped = query.float().transpose(0, 1).reshape(num_kv_heads, -1, query.shape[2])
    scores = (grouped @ keys.transpose(1, 2)).view(num_heads, num_queries, length) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores.masked_fill_(_hidden(num_queries, length, sliding_window, query.device), -torch.inf)
    if sinks is not None:
        column = sinks.float().view(-1, 1, 1).expand(-1, num_queries, 1)
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
