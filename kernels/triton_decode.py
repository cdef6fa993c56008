"""Paged attention of sequences that run one token, split over the context.

Flash-decoding (Dao, Haziza, Massa and Sizov, 2023): each program attends to one part of a sequence's context with all
query heads of one kv head, so that keys and values are read once; a second kernel joins the parts by their logarithmic
sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_tile import LOG2_E, LOWEST, attend_tile, load_blocks, load_rows

_RUN_TIME = ["table_stride", "num_parts", "sliding_window", "has_sinks"]


@triton.jit(do_not_specialize=_RUN_TIME)
def decode_parts(
    query,  # [T, num_heads, K_DIM]
    key_cache,  # [num_blocks, BLOCK_SIZE, num_kv_heads, K_DIM]
    value_cache,  # [num_blocks, BLOCK_SIZE, num_kv_heads, V_DIM]
    block_tables,  # int32 [S, widest table]
    context_lens,  # int32 [S]
    sinks,  # float32 [num_heads]
    key_scales,  # float32 [num_kv_heads]
    value_scales,  # float32 [num_kv_heads]
    parts,  # float32 [S, num_heads, num_parts, V_DIM]
    part_logs,  # float32 [S, num_heads, num_parts]: logarithm, base 2, of the sum of weights
    scale,
    soft_cap,
    sliding_window,
    has_sinks,
    num_parts,
    table_stride,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
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
    """One part of one sequence, for the query heads of one kv head: grid (num_kv_heads, num_parts, S)."""
    kv_head, part, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(context_lens + sequence)
    window = tl.where(sliding_window > 0, sliding_window, length)
    first = tl.maximum(length - window, 0)
    span = tl.cdiv(tl.cdiv(length - first, num_parts), TILE_KEYS) * TILE_KEYS
    begin = first + part * span
    end = tl.minimum(begin + span, length)

    rows = tl.arange(0, TILE_ROWS)
    head = kv_head * GROUP + rows
    is_row = rows < GROUP
    query_rows = query + sequence * query_token_stride + head * query_head_stride
    q = load_rows(query_rows, is_row, K_DIM, K_PAD, True)
    # A sink is a key with no value, seen by the first part alone.
    num_sinks = tl.where(part == 0, has_sinks * GROUP, 0)
    sink = tl.load(sinks + head, mask=rows < num_sinks, other=LOWEST)
    top = tl.maximum(sink * LOG2_E, LOWEST)
    weight_sum = tl.where(sink > LOWEST, 1.0, 0.0)
    total = tl.zeros([TILE_ROWS, V_PAD], tl.float32)
    factor = scale
    if HAS_SCALES:
        factor = factor * tl.load(key_scales + kv_head)
    if not HAS_CAP:
        factor = factor * LOG2_E
    position = tl.zeros([TILE_ROWS], tl.int32) + length - 1
    table = block_tables + sequence.to(tl.int64) * table_stride
    block = load_blocks(table, begin, end, BLOCK_SIZE, TILE_KEYS)
    for first_key in range(begin, end, TILE_KEYS):
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
            key_cache + kv_head * key_head_stride,
            value_cache + kv_head * value_head_stride,
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
            True,
        )
        block = next_block

    # A part without keys or sink weighs nothing: its logarithm is minus infinity and its values are zeros.
    is_empty = weight_sum == 0
    out = total / tl.where(is_empty, 1.0, weight_sum)[:, None]
    if HAS_SCALES:
        out = out * tl.load(value_scales + kv_head)
    at = (sequence * tl.num_programs(0) * GROUP + head).to(tl.int64) * num_parts + part
    logs = tl.where(is_empty, float("-inf"), top + tl.log2(tl.where(is_empty, 1.0, weight_sum)))
    tl.store(part_logs + at, logs, mask=is_row)
    columns = tl.arange(0, V_PAD)
    is_out = is_row[:, None] & (columns < V_DIM)[None, :]
    tl.store(
        parts + at[:, None] * V_DIM + columns[None, :], out.to(parts.dtype.element_ty), mask=is_out
    )


@triton.jit(do_not_specialize=["num_parts"])
def join_parts(
    parts,  # float32 [S, num_heads, num_parts, V_DIM]
    part_logs,  # float32 [S, num_heads, num_parts]
    out,  # [S, num_heads, V_DIM]
    num_parts,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    TILE_PARTS: tl.constexpr,
):
    """One head of one sequence: the mean of its parts, weighed by their sums. Grid (S * num_heads,)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, V_PAD)
    top = LOWEST
    weight_sum = 0.0
    total = tl.zeros([V_PAD], tl.float32)
    for first in range(0, num_parts, TILE_PARTS):
        part = first + tl.arange(0, TILE_PARTS)
        is_part = part < num_parts
        logs = tl.load(part_logs + row * num_parts + part, mask=is_part, other=float("-inf"))
        pointers = parts + (row * num_parts + part)[:, None] * V_DIM + columns[None, :]
        values = tl.load(pointers, mask=is_part[:, None] & (columns < V_DIM)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(logs, 0))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(logs - new_top)
        weight_sum = weight_sum * fade + tl.sum(weights, 0)
        total = total * fade + tl.sum(weights[:, None] * values, 0)
        top = new_top
    joined = total / weight_sum
    tl.store(out + row * V_DIM + columns, joined.to(out.dtype.element_ty), mask=columns < V_DIM)
