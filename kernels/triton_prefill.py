"""Paged causal attention of chunks of a prompt.

FlashAttention-2 (Dao, 2023, arXiv:2307.08691) over block tables. The query heads of a kv head share each program's rows,
so that keys and values are read once for all of them; only tiles at the diagonal and at a window's edge are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_tile import LOG2_E, LOWEST, attend_tile, load_blocks, load_rows

_RUN_TIME = ["table_stride", "first_sequence", "sliding_window", "has_sinks"]


@triton.jit(do_not_specialize=_RUN_TIME)
def prefill(
    query,  # [T, num_heads, K_DIM]
    key_cache,  # [num_blocks, BLOCK_SIZE, num_kv_heads, K_DIM]
    value_cache,  # [num_blocks, BLOCK_SIZE, num_kv_heads, V_DIM]
    block_tables,  # int32 [S, widest table]
    query_start,  # int32 [S + 1]
    context_lens,  # int32 [S]
    sinks,  # float32 [num_heads]
    key_scales,  # float32 [num_kv_heads]
    value_scales,  # float32 [num_kv_heads]
    out,  # [T, num_heads, V_DIM]
    scale,
    soft_cap,
    sliding_window,
    has_sinks,
    first_sequence,
    table_stride,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    out_token_stride,
    out_head_stride,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """TILE_ROWS // GROUP queries of one sequence, for one kv head: grid (tiles of the longest chunk, num_kv_heads, S)."""
    sequence = first_sequence + tl.program_id(2)
    kv_head = tl.program_id(1)
    tile_queries: tl.constexpr = TILE_ROWS // GROUP
    # The last queries see most keys: they start first, so that no long program is left at the end.
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * tile_queries
    begin_token = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - begin_token
    if first_query >= num_queries:
        return
    length = tl.load(context_lens + sequence)

    rows = tl.arange(0, TILE_ROWS)
    query_index = first_query + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    is_row = (rows < tile_queries * GROUP) & (query_index < num_queries)
    position = length - num_queries + query_index
    token = (begin_token + query_index).to(tl.int64)
    query_rows = query + token * query_token_stride + head * query_head_stride
    q = load_rows(query_rows, is_row, K_DIM, K_PAD, True)
    sink = tl.load(sinks + head, mask=rows < has_sinks * TILE_ROWS, other=LOWEST)
    top = tl.maximum(sink * LOG2_E, LOWEST)
    weight_sum = tl.where(sink > LOWEST, 1.0, 0.0)
    total = tl.zeros([TILE_ROWS, V_PAD], tl.float32)
    factor = scale
    if HAS_SCALES:
        factor = factor * tl.load(key_scales + kv_head)
    if not HAS_CAP:
        factor = factor * LOG2_E

    # Keys [begin, end) are seen by some query of the tile, [all_begin, all_end) by every one.
    window = tl.where(sliding_window > 0, sliding_window, length)
    first_position = length - num_queries + first_query
    last_position = tl.minimum(first_position + tile_queries, length) - 1
    begin = tl.maximum(first_position - window + 1, 0) // TILE_KEYS * TILE_KEYS
    end = last_position + 1
    all_begin = tl.cdiv(tl.maximum(last_position - window + 1, 0), TILE_KEYS) * TILE_KEYS
    all_end = (first_position + 1) // TILE_KEYS * TILE_KEYS
    all_begin = tl.minimum(tl.maximum(all_begin, begin), tl.cdiv(end, TILE_KEYS) * TILE_KEYS)
    all_end = tl.maximum(all_end, all_begin)
    table = block_tables + sequence.to(tl.int64) * table_stride
    key_head = key_cache + kv_head * key_head_stride
    value_head = value_cache + kv_head * value_head_stride
    for edge in tl.static_range(3):
        first = begin if edge == 0 else (all_begin if edge == 1 else all_end)
        last = all_begin if edge == 0 else (all_end if edge == 1 else end)
        block = load_blocks(table, first, end, BLOCK_SIZE, TILE_KEYS)
        for first_key in range(first, last, TILE_KEYS):
            next_block = load_blocks(table, first_key + TILE_KEYS, end, BLOCK_SIZE, TILE_KEYS)
            total, top, weight_sum = attend_tile(
                q,
                total,
                top,
                weight_sum,
                first_key,
                end,
                position,
                window,
                factor,
                soft_cap,
                block,
                key_head,
                value_head,
                key_block_stride,
                key_slot_stride,
                value_block_stride,
                value_slot_stride,
                K_DIM,
                V_DIM,
                K_PAD,
                V_PAD,
                BLOCK_SIZE,
                TILE_KEYS,
                HAS_CAP,
                edge != 1,
            )
            block = next_block

    # Only rows beyond the chunk have seen nothing; they are not stored.
    result = total / tl.where(weight_sum == 0, 1.0, weight_sum)[:, None]
    if HAS_SCALES:
        result = result * tl.load(value_scales + kv_head)
    out_rows = out + token * out_token_stride + head * out_head_stride
    columns = tl.arange(0, V_PAD)
    is_out = is_row[:, None] & (columns < V_DIM)[None, :]
    tl.store(out_rows[:, None] + columns[None, :], result.to(out.dtype.element_ty), mask=is_out)
